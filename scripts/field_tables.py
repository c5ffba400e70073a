"""Put the tables that the examples of other fields have written into their pages.

    python scripts/field_tables.py OUTPUT docs/fields/*.md

OUTPUT is the --output of the commands. In a page, everything between `<!-- table NAME -->` and
`<!-- end -->` becomes the tables of OUTPUT/NAME.md; `<!-- table NAME accuracy loss -->` takes those
of these metrics only. Last line: the number of places that were filled.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_PLACE = re.compile(
    r"(<!-- table (?P<name>[\w-]+)(?P<metrics>[ \w]*) -->\n).*?(<!-- end -->)", re.DOTALL
)


def filled(page: str, output: Path) -> tuple[str, int]:
    """A page with the tables that there are, and their number; other tables stay."""
    put = 0

    def table(place: re.Match[str]) -> str:
        nonlocal put
        file = output / f"{place['name']}.md"
        if not file.exists():
            return place[0]
        put += 1
        parts = file.read_text(encoding="utf-8").strip().split("\n\n")
        metrics = place["metrics"].split()
        kept = [
            part
            for part in parts
            if not (metrics and part.startswith("| ")) or part.split()[1] in metrics
        ]
        return "\n\n".join([place[1], *kept, place[4]]).replace("\n\n\n", "\n\n")

    return _PLACE.sub(table, page), put


def main() -> None:
    """Fill the pages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("pages", type=Path, nargs="+")
    options = parser.parse_args()
    total = 0
    for path in options.pages:
        page, put = filled(path.read_text(encoding="utf-8"), options.output)
        path.write_text(page, encoding="utf-8")
        total += put
    print(f"{total} tables")


if __name__ == "__main__":
    main()

"""Print the lowest versions that setup.cfg allows, as constraints for pip: `torch==2.9`.

    python scripts/bounds.py > lowest.txt

Requirements without a lower bound are left to pip. `bash scripts/run.sh versions lowest` uses it.
"""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path

_BOUND = re.compile(r"^([\w.-]+)>=([\w.]+)$")


def lowest(path: Path) -> list[str]:
    """A line for every requirement of setup.cfg with a lower bound."""
    parser = configparser.ConfigParser()
    parser.read(path)
    extras = parser["options.extras_require"]
    named = [parser["options"]["install_requires"], *(extras[name] for name in extras)]
    lines = [line.strip() for block in named for line in block.splitlines()]
    return [f"{m[1]}=={m[2]}" for line in lines if (m := _BOUND.match(line.replace(" ", "")))]


if __name__ == "__main__":
    sys.stdout.write("\n".join(lowest(Path(__file__).parents[1] / "setup.cfg")) + "\n")

"""A campaign against rnnopt: what goes wrong when something goes wrong.

    python scripts/campaign/run.py                 all parts, about an hour of one core
    python scripts/campaign/run.py kills places    some of them
    python scripts/campaign/run.py --small         a few cases of each, a minute
    python scripts/campaign/run.py --table         docs/results/campaign.md from the figures

Parts: kills, places, files, gradients, workers, long. Each writes its figures to campaign.json
(--figures) when it ends; the exit code is 1 where a case went wrong. Linux, and the extras meta and
test. Memory below 2 GB.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from children import prepare, warm

PARTS = ("kills", "places", "files", "gradients", "workers", "long")


def main() -> int:
    """Run the parts that were named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="a few cases of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000, help="of the part files")
    parser.add_argument("--figures", type=Path, default=Path("campaign.json"))
    parser.add_argument("--table", action="store_true", help="only write the page of the docs")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"{', '.join(unknown)}: no part; choose from {', '.join(PARTS)}")
    if arguments.table:
        from table import write

        write(json.loads(arguments.figures.read_text()))
        return 0
    prepare()
    from material import jobs, make

    wrong = 0
    with tempfile.TemporaryDirectory(prefix="campaign-") as scratch:
        folder = Path(scratch)
        material = make(folder)
        for job in jobs(material):
            (folder / "warm" / job.name).mkdir(parents=True)
            warm(job.words(folder / "warm" / job.name))
        for name in arguments.parts or PARTS:
            begun = time.monotonic()
            (folder / name).mkdir()
            module = importlib.import_module(name)
            if name == "files":
                module.COUNT = arguments.cases
            found = module.part(material, folder / name, arguments.seed, arguments.small)
            print(json.dumps({name: found}, indent=1), flush=True)
            keep(arguments.figures, name, found, time.monotonic() - begun, arguments.seed)
            wrong += sum(len(figures["bad"]) for figures in found.values())
    return int(wrong > 0)


def keep(path: Path, name: str, found: dict[str, Any], seconds: float, seed: int) -> None:
    """Add a part's figures to those of the others."""
    import torch
    import transformers

    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {
        "figures": found,
        "seconds": round(seconds),
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    path.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

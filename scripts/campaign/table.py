"""docs/results/campaign.md from the figures of a campaign."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "results" / "campaign.md"
ABOUT = {
    "kills": (
        "SIGKILL, then the same command again",
        "Half of the moments are random times, half are writes, the first five and random ones: a "
        "file opened, forced to the disk or renamed. *Same bits* counts those whose result is that "
        "of an undisturbed run; *half written* those that left a file incomplete under its final "
        "name.",
    ),
    "places": (
        "Full disk, read-only folder, two runs at once, a clock set back, a folder moved",
        "Meta-training, comparison, `fit` and `adapt` under each condition. *Right* are those that "
        "end with one line that says why, and lose nothing: where the condition is over, the same "
        "command ends with the bits of an undisturbed run. The disk is full at 100, 3,000 and "
        "12,000 bytes a file.",
    ),
    "files": (
        "Damaged and hostile files",
        "Flipped bits, cuts, noise, repeated and swapped parts, wild sizes and numbers, nesting to "
        "200,000 levels, NaN weights, altered headers, and gzip files that unpack to 64 and 512 "
        "MB. *Clear* are those that were refused with one line and exit code 2, or made no "
        "difference, in less than 10 s of a processor and 1 GB of resident memory.",
    ),
    "gradients": (
        "Gradients of any kind",
        "Random tensors of 1 to 1,000,003 coordinates in float32, bfloat16 and float16, with and "
        "without the kernel, and one of 100,000,000; gradients at scales from 1e-30 "
        "to 1e30, zero, with NaN and infinities, sparse rows, jumps, flipped signs, denormals and "
        "outliers. *Right*: no step "
        "beyond the rule's bound, no number in parameters or memory that is not finite, and a "
        "plain gradient at the end moves something. Bounds follow from the rules' weights and are "
        "not tight.",
    ),
    "workers": (
        "Four processes of one meta-training",
        "One process is killed; is stopped for 2 s four times; is stopped for good. *Right*: the "
        "others end and one says which process is lost, within 60 s, and three processes go on "
        "from there; a slow process disturbs nothing.",
    ),
    "long": (
        "Long use",
        "A task whose classes drift without an end, in minibatches of 32, and tasks of ten steps "
        "of LoRA in a row. *Growth* is that of resident memory from a fifth of the way to the end; "
        "2 % are borne.",
    ),
}  # fmt: skip


def write(figures: dict[str, Any]) -> None:
    """Write the page."""
    parts = [
        "# A campaign of faults",
        "What happens when something goes wrong: processes that are killed, disks that are full, "
        "files that are damaged, gradients that make no sense. `scripts/campaign/run.py` does all "
        "of this again in about an hour, and its exit code is 1 where a case goes wrong. The "
        "numbers of cases are counts, not estimates, so they have no interval; a count of 30 of 30 "
        "still leaves room for a failure in 10 of 100 (95 %).",
    ]
    for name, (title, about) in ABOUT.items():
        if name not in figures:
            continue
        found = figures[name]
        wrong = sum(len(row["bad"]) for row in found["figures"].values())
        told = f" {wrong} cases of this run went wrong." if wrong else ""
        versions = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
        parts += [
            f"## {title}", about, _table(found["figures"]),
            f"`python scripts/campaign/run.py {name} --seed {found['seed']}`, {found['date']}, "
            f"{found['seconds']:,} s on a busy machine, {versions}.{told}",
        ]  # fmt: skip
    PAGE.write_text("\n\n".join(map(_wrapped, parts)) + "\n")


def _wrapped(text: str) -> str:
    """Paragraphs in lines of 115 characters; tables and headings as they are."""
    return text if text[0] in "|#" else textwrap.fill(text, 115, break_on_hyphens=False)


def _table(figures: dict[str, dict[str, Any]]) -> str:
    columns = [key for key in next(iter(figures.values())) if key != "bad"]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in figures.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:,}" for key in columns) + " |")
    return "\n".join(lines)

"""Damaged and hostile files: rule files, checkpoints, journals, settings, labelled texts, gzip."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from children import run
from material import Material

LONGEST, MOST_MEGABYTES = 10.0, 1024.0
COUNT = 1000


@dataclasses.dataclass(frozen=True)
class Target:
    """A file, and the command that reads it.

    Attributes:
        path: where the command reads it, relative to the case's folder.
        original: the whole file.
        words: the command, from the case's folder.
        share: of the cases.
    """

    path: str
    original: bytes
    words: Callable[[Path], list[object]]
    share: float


def part(material: Material, folder: Path, seed: int, small: bool) -> dict[str, Any]:
    """Change files at random, and run the commands that read them.

    Returns:
        Of each kind of file: the cases, how many were told clearly or made no difference, the
        longest run in seconds, the largest resident memory in MB, and what went wrong.
    """
    chance, figures = random.Random(seed), {}
    count = 24 if small else COUNT
    base = folder / "base"
    base.mkdir()
    for name, target in _targets(material, base).items():
        good, bad, ends = 0, [], []
        cases = max(2, round(count * target.share))
        for case in range(cases):
            how, content = mutated(target.original, Path(target.path).suffix, chance)
            here = folder / "case"
            shutil.copytree(base, here, ignore=shutil.ignore_patterns("unused"))
            (here / target.path).write_bytes(content)
            ended = run(target.words(here), seconds=12 * LONGEST)  # a busy machine takes longer
            fine = ended.clear and ended.processor < LONGEST and ended.megabytes < MOST_MEGABYTES
            good += fine
            ends.append(ended)
            if not fine:
                kept = folder.parent / f"{name.replace(' ', '-')}-{case}"
                kept.write_bytes(content[: 2**20])
                facts = f"{ended.processor:.1f} s, {ended.megabytes:.0f} MB, exit {ended.code}"
                bad.append(f"{case}: {how}: {facts}: {ended.text[-500:]}")
            shutil.rmtree(here)
        codes = Counter(end.code for end in ends)
        figures[name] = {
            "cases": cases, "clear": good, "refused": codes[2], "borne": codes[0] + codes[3],
            "longest, s": round(max(end.processor for end in ends), 1),
            "most memory, MB": round(max(end.megabytes for end in ends)), "bad": bad,
        }  # fmt: skip
    return figures


def mutated(original: bytes, suffix: str, chance: random.Random) -> tuple[str, bytes]:
    """One change of a file: what it is, and the new content."""
    kinds = ["bits", "cut", "noise", "repeat", "sizes", "swap", "nothing", "nested", "numbers"]
    if suffix == ".safetensors":
        kinds += ["nan", "header", "header"]
    if suffix == ".gz":
        kinds += ["bomb", "inside", "inside"]
    kind = chance.choice(kinds)
    content = bytearray(original)
    place = chance.randrange(len(content))
    if kind == "bits":
        for _ in range(chance.choice([1, 1, 3, 30])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "noise":
        content[place : place + 64] = chance.randbytes(chance.choice([1, 64, 5000]))
    elif kind == "repeat":
        content[place:place] = content[max(0, place - 200) : place] * chance.choice([1, 50, 2000])
    elif kind == "sizes":  # where a format keeps them: at the start
        content[:8] = struct.pack("<Q", chance.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
    elif kind == "swap":
        half = len(content) // 2
        content = content[half:] + content[:half]
    elif kind == "nothing":
        content = bytearray(
            chance.choice([b"", b"\n", b"\x00" * 4096, b"\xff\xfe", b"null\n", b"[]"])
        )
    elif kind == "nested":
        depth = chance.choice([100, 5_000, 200_000])
        inner = chance.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth])
        content[place:place] = inner
    elif kind == "numbers":
        content = _other_number(content, chance)
    elif kind == "nan":
        content[-8:] = struct.pack("<2f", float("nan"), float("inf"))
    elif kind == "header":
        content = _other_header(content, chance)
    elif kind == "bomb":
        content = bytearray(gzip.compress(bytes(chance.choice([2**26, 2**29]))))
    else:
        content = bytearray(gzip.compress(mutated(gzip.decompress(original), ".csv", chance)[1]))
    return kind, bytes(content)


def _other_number(content: bytearray, chance: random.Random) -> bytearray:
    """Put a wild value in place of a digit."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if places:
        i = chance.choice(places)
        wild = (b"-1", b"1e999", b"NaN", b"9" * 5000, b"null", b'"x"', b"[]", b"0.5", b"{}")
        content[i : i + 1] = chance.choice(wild)
    return content


def _other_header(content: bytearray, chance: random.Random) -> bytearray:
    """Change the JSON that a safetensors file begins with, and keep its length right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = _other_number(content[8 : 8 + length], chance)
    if chance.random() < 0.5:
        words = (b"F32", b"format", b"config", b"meta_step", b"shape", b"hidden")
        header = header.replace(chance.choice(words), chance.choice([b"F16", b"", b"x" * 300]))
    return bytearray(struct.pack("<Q", len(header))) + header + content[8 + length :]


def _targets(material: Material, base: Path) -> dict[str, Target]:
    """The files as rnnopt leaves them, in a folder that every case copies."""
    from rnnopt.rules.files import SHIPPED_RULE

    few = ["--ways", 2, "--shots", 2, "--queries", 3, "--steps", 2, "--tune", "head"]
    of = ["--encoder", material.encoder]
    adapt = ["adapt", *of, "--tune", "head", "--steps", 1, "--allow-overlap"]
    train = [
        "meta-train", "--data", material.data, *of, *few, "--meta-steps", 2, "--validate-every", 1,
        "--validation-tasks", 2, "--checkpoint-every", 1, "--resume",
    ]  # fmt: skip
    compare = [
        "compare", "--data", material.data, *of, *few, "--episodes", 2, "--tuning-episodes", 2,
        "--allow-overlap", "--baselines", "sgd",
    ]  # fmt: skip
    for words in (
        [*train, "--output", base / "run"],
        [*compare, "--json", base / "figures.json"],
        ["fit", "--data", material.small, *of, "--steps", 0, "--output", base / "fitted"],
    ):
        if (ended := run(words)).code:
            raise RuntimeError(ended.text)
    shutil.copy(SHIPPED_RULE, base / "rule.safetensors")
    csv = material.small.read_bytes()
    rows = [line.split(",") for line in csv.decode().splitlines()[1:]]
    jsonl = "".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows).encode()
    settings = (
        f"data: {material.small}\nsteps: 1\ntune: head\nallow_overlap: true\nlr: 1.0\n".encode()
    )
    for name, content in (
        ("x.csv", csv), ("x.tsv", csv.replace(b",", b"\t")), ("x.jsonl", jsonl),
        ("x.csv.gz", gzip.compress(csv)), ("s.yaml", settings),
    ):  # fmt: skip
        (base / name).write_bytes(content)

    def labelled(name: str) -> Callable[[Path], list[object]]:
        return lambda here: [*adapt, "--data", here / name, "--output", here / "out"]

    def ruled(name: str) -> Callable[[Path], list[object]]:
        rest = ["--data", material.small, "--rule"]
        return lambda here: [*adapt, *rest, here / name, "--output", here / "out"]

    def predict(here: Path) -> list[object]:
        return ["predict", "--model", here / "fitted", "--text", "a song"]

    def resume(here: Path) -> list[object]:
        return [*train, "--output", here / "run", "--meta-steps", 3]

    chosen: dict[str, tuple[str, Callable[[Path], list[object]], float]] = {
        "rule": ("rule.safetensors", ruled("rule.safetensors"), 0.22),
        "checkpoint": ("run/checkpoint.safetensors", resume, 0.1),
        "log of a run": ("run/log.jsonl", resume, 0.05),
        "facts of a run": ("run/run.json", resume, 0.05),
        "provenance": ("run/provenance.json", resume, 0.03),
        "journal": (
            "figures.json.runs", lambda here: [*compare, "--json", here / "figures.json"], 0.1,
        ),
        "figures for a report": (
            "figures.json", lambda here: ["report", here / "figures.json"], 0.05,
        ),
        "settings": (
            "s.yaml",
            lambda here: ["adapt", "--config", here / "s.yaml", *of, "--output", here / "out"],
            0.08,
        ),
        "CSV": ("x.csv", labelled("x.csv"), 0.08),
        "TSV": ("x.tsv", labelled("x.tsv"), 0.05),
        "JSON lines": ("x.jsonl", labelled("x.jsonl"), 0.08),
        "gzip": ("x.csv.gz", labelled("x.csv.gz"), 0.06),
        "head of a classifier": ("fitted/head.safetensors", predict, 0.02),
        "facts of a classifier": ("fitted/classifier.json", predict, 0.02),
        "configuration of an encoder": ("fitted/config.json", predict, 0.01),
    }  # fmt: skip
    return {
        name: Target(path, (base / path).read_bytes(), words, share)
        for name, (path, words, share) in chosen.items()
    }

"""What the campaign works on: an encoder, labelled texts, and the commands with their results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load

NOUNS = {
    "weather": "rain snow sun storm fog wind", "music": "song jazz album band singer guitar",
    "money": "bank account euros card bill loan", "food": "table pizza soup cook menu lunch",
    "travel": "train flight hotel ticket taxi map", "time": "alarm clock hour wake timer watch",
    "health": "doctor pill fever nurse pain cough", "sport": "goal match team coach ball league",
}  # fmt: skip
FRAMES = ("tell me about the {}", "i want a {} today", "my {} please")
# entries of results that differ between two runs of the same command
_VOLATILE = {
    "seconds", "time", "seconds_per_step", "starts", "versions", "elapsed", "output", "json",
    "until", "resume", "meta_seconds", "seconds_per_task", "memory",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Material:
    """Files for commands.

    Attributes:
        data: a CSV file of 8 classes.
        small: one of 2 classes.
        encoder: a folder.
    """

    data: Path
    small: Path
    encoder: Path


def make(folder: Path) -> Material:
    """Write the material into a folder."""
    from rnnopt.tasks.text.encoder.loading import small_bert

    pairs = [
        (frame.format(noun), label)
        for label, nouns in NOUNS.items()
        for noun in nouns.split()
        for frame in FRAMES
    ]
    data, small = folder / "things.csv", folder / "two.csv"
    for path, rows in ((data, pairs), (small, [p for p in pairs if p[1] in ("food", "sport")])):
        path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    encoder = small_bert([text for text, _ in pairs], hidden_size=16, folder=folder / "encoder")
    return Material(data, small, Path(encoder))


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that is to leave the same result however often it is stopped.

    Attributes:
        name: for people.
        words: the command that begins it, or goes on, in a folder.
        result: a digest of what it has left in that folder.
    """

    name: str
    words: Callable[[Path], list[object]]
    result: Callable[[Path], str]


def jobs(material: Material) -> list[Job]:
    """Meta-training, comparison, `fit`, and saving a fine-tuned classifier."""
    few = ["--ways", 2, "--shots", 2, "--queries", 3, "--steps", 2, "--tune", "head"]
    of = ["--encoder", material.encoder]
    return [
        Job(
            "meta-training",
            lambda folder: [
                "meta-train", "--data", material.data, *of, *few, "--meta-steps", 6,
                "--validate-every", 3, "--validation-tasks", 2, "--checkpoint-every", 1,
                "--output", folder / "run", "--resume",
            ],
            lambda folder: digest(folder / "run", ("rule.safetensors", "log.jsonl", "run.json")),
        ),
        Job(
            "comparison",
            lambda folder: [
                "compare", "--data", material.data, *of, *few, "--episodes", 3, "--allow-overlap",
                "--tuning-episodes", 2, "--baselines", "sgd", "--json", folder / "figures.json",
            ],
            lambda folder: digest(folder, ("figures.json",)),
        ),
        Job(
            "fit",
            lambda folder: [
                "fit", "--data", material.small, *of, "--steps", 2, "--seconds", 1e6,
                "--output", folder / "classifier",
            ],
            lambda folder: digest(
                folder / "classifier", ("head.safetensors", "model.safetensors", "classifier.json")
            ),
        ),
        Job(
            "saving",
            lambda folder: [
                "adapt", "--data", material.small, *of, "--steps", 1, "--allow-overlap",
                "--tune", "head", "--output", folder / "tuned",
            ],
            lambda folder: digest(folder / "tuned", ("model.safetensors", "config.json")),
        ),
    ]  # fmt: skip


def digest(folder: Path, names: tuple[str, ...]) -> str:
    """A hash of files without what differs between two runs, such as seconds."""
    found = hashlib.sha256()
    for name in names:
        content = (folder / name).read_bytes()
        if name.endswith(".json"):
            content = json.dumps(_lasting(json.loads(content)), sort_keys=True).encode()
        elif name.endswith(".jsonl"):
            lines = [_lasting(json.loads(line)) for line in content.splitlines()]
            content = json.dumps(lines, sort_keys=True).encode()
        elif name.endswith(".safetensors"):
            leaves = sorted(load(content).items())
            content = b"".join(key.encode() + leaf.numpy().tobytes() for key, leaf in leaves)
        found.update(content)
    return found.hexdigest()[:16]


def half_written(folder: Path) -> list[str]:
    """Files under their final names that are not complete. Logs may end within a line."""
    broken = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        try:
            content = path.read_bytes()
            if path.suffix == ".json":
                json.loads(content)
            elif path.suffix == ".safetensors":
                load(content)
            elif path.suffix == ".png":
                assert content.endswith(b"IEND\xaeB`\x82")
            elif path.suffix in (".md", ".yaml"):
                assert content.endswith(b"\n")
        except Exception:
            broken.append(str(path.relative_to(folder)))
    return broken


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(leaf) for key, leaf in value.items() if key not in _VOLATILE}
    return [_lasting(leaf) for leaf in value] if isinstance(value, list) else value

"""Long use: many steps on a task that drifts, and many tasks in one process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from children import Child
from material import Material
from torch import nn
from torch.nn.functional import cross_entropy

GROWTH = 0.02  # of resident memory that is borne, from a fifth of the way to the end


def part(material: Material, folder: Path, seed: int, small: bool) -> dict[str, Any]:
    """Train for long in a process of its own, and watch its memory.

    Returns:
        Of each way: how long, by how much resident memory grew, the accuracy at its end where
        there is one, and what went wrong.
    """
    steps, tasks = (300, 10) if small else (10_000, 200)
    return {
        "drifting task": _in_child(_drift, folder, steps, seed, small),
        "tasks in a row": _in_child(
            _tasks, folder, tasks, seed, small, material.encoder, material.data
        ),
    }


def resident() -> float:
    """Resident memory of this process, MB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


def _in_child(
    work: Any, folder: Path, count: int, seed: int, small: bool, *more: object
) -> dict[str, Any]:
    report = folder / work.__name__

    def go() -> int:
        report.write_text(json.dumps(work(count, seed, *more)))
        return 0

    ended = Child(go).wait(3600)
    if ended.code:
        return {"count": count, "bad": [f"exit {ended.code}: {ended.text[-500:]}"]}
    early, late, accuracy = json.loads(report.read_text())
    growth = late / early - 1
    bad = [f"memory grew by {growth:.1%}, {early:.0f} to {late:.0f} MB"] if growth > GROWTH else []
    if not accuracy > 0.8 and not small and work is _drift:
        bad.append(f"accuracy {accuracy:.2f} at the end")
    return {
        "count": count, "memory, MB": round(late), "growth, %": round(100 * growth, 2),
        "accuracy at the end": round(accuracy, 3), "bad": bad,
    }  # fmt: skip


def _drift(steps: int, seed: int) -> tuple[float, float, float]:
    """Classes whose border turns round once in 2,500 steps; the accuracy of the last 500 steps."""
    from rnnopt import LearnedOptimizer

    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = LearnedOptimizer(net.parameters())
    early, right = 0.0, []
    for step in range(steps):
        angle = torch.tensor(step * 2 * torch.pi / 2500)
        inputs = torch.randn(32, 8)
        labels = (inputs[:, 0] * angle.cos() + inputs[:, 1] * angle.sin() > 0).long()
        optimizer.zero_grad()
        logits = net(inputs)
        cross_entropy(logits, labels).backward()
        optimizer.step()
        if step >= steps - 500:
            right.append(float((logits.argmax(1) == labels).float().mean()))
        if step == steps // 5:
            early = resident()
    return early, resident(), sum(right) / len(right)


def _tasks(tasks: int, seed: int, encoder: Path, data: Path) -> tuple[float, float, float]:
    """Ten steps of LoRA on two classes each; the mean accuracy on what was trained on."""
    from rnnopt import LearnedOptimizer
    from rnnopt.data.files import read_corpus
    from rnnopt.tasks.text.classifier import Classifier
    from rnnopt.tasks.text.tasks import LabelledTexts

    corpus, chance = read_corpus(data), random.Random(seed)
    labels = sorted(set(corpus.labels))
    classifier = Classifier.load(encoder, tune="lora", ways=2, device=torch.device("cpu"))
    early, right = 0.0, []
    for task in range(tasks):
        pair = chance.sample(labels, 2)
        rows = [(t, pair.index(y)) for t, y in zip(corpus.texts, corpus.labels) if y in pair]
        rows = chance.sample(rows, 16)
        classifier.reset(2, task)
        batch = LabelledTexts.read(classifier, [t for t, _ in rows], [y for _, y in rows])
        params = [param for _, param in classifier.trainable()]
        optimizer = LearnedOptimizer(params)
        for _ in range(10):
            optimizer.zero_grad()
            batch.loss(classifier, classifier.model).backward()
            optimizer.step()
        with torch.no_grad():
            logits = classifier.logits(classifier.batch([t for t, _ in rows]))
        right.append(float((logits.argmax(1) == torch.tensor([y for _, y in rows])).float().mean()))
        if task == tasks // 5:
            early = resident()
    return early, resident(), sum(right) / len(right)

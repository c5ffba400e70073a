"""`rnnopt demo`: the whole way on an embedded default, with nothing to download.

The texts are docstrings of the Python standard library, the task is to tell from which module
one is; the encoder is a small BERT made from its config. What is shown is the method, not its
best figures: those need a pretrained encoder, see the README.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from tqdm import tqdm

from rnnopt.checkpoint import write_atomically
from rnnopt.commands import comparison_table
from rnnopt.corpus import class_sketches, stdlib_splits, summary
from rnnopt.episodes import EpisodeSampler
from rnnopt.errors import InputError
from rnnopt.evaluate import Comparison, Journal, default_budgets
from rnnopt.metatrain import MetaTraining, MetaTrainSettings
from rnnopt.plot import plot_comparison
from rnnopt.task import TaskSource
from rnnopt.text import Classifier, small_bert
from rnnopt.unroll import UnrollSettings

WAYS, SHOTS, QUERIES, STEPS = 5, 5, 10, 10
META_STEPS = 150
EPISODES, TUNING_EPISODES = 40, 10


def demo(folder: Path, seed: int = 0) -> None:
    """Meta-train, adapt to unseen classes, compare with tuned AdamW, report.

    Args:
        folder: gets ``report.md``, ``comparison.png``, the encoder and the run; must be absent or
            empty.
        seed: of everything random.

    Raises:
        InputError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; choose another --output")
    torch.manual_seed(seed)
    started = time.perf_counter()
    splits = stdlib_splits(seed)
    print(f"docstrings of the standard library: {summary(splits.train)} to meta-train on")
    encoder = small_bert(splits.train.texts, seed=seed, folder=folder / "encoder")
    classifier = Classifier.load(
        encoder, tune="full", pooling="mean", ways=WAYS, device=torch.device("cpu"), seed=seed
    )
    train, validation, test = (
        TaskSource(
            EpisodeSampler(corpus, ways=WAYS, shots=SHOTS, queries=QUERIES, seed=seed), classifier
        )
        for corpus in (splits.train, splits.validation, splits.test)
    )
    run = MetaTraining(
        classifier,
        train,
        validation,
        MetaTrainSettings(META_STEPS, UnrollSettings(STEPS), seed=seed),
        folder / "run",
        facts={"data": "stdlib"},
        training={"classes": class_sketches(splits.train)},
    )
    with tqdm(total=META_STEPS, desc="meta-training", unit="meta-step") as bar:
        rule = run.run(lambda record: bar.update(record["meta_step"] - bar.n))
    rule.requires_grad_(False)
    budgets = default_budgets(STEPS)
    journal = Journal(folder / "runs.jsonl", {"seed": seed})
    with tqdm(desc="adapting to unseen classes", unit="run") as bar:
        comparison = Comparison(
            classifier, rule, validation, test, budgets, ["adamw"], journal,
            tick=lambda name: bar.update(),
        )  # fmt: skip
        bar.total = comparison.runs_at_most(EPISODES, TUNING_EPISODES)
        result = comparison.run(EPISODES, TUNING_EPISODES)
    title = f"{WAYS}-way {SHOTS}-shot on modules never seen, {EPISODES} episodes"
    plot_comparison(result, title, folder / "comparison.png")
    table = comparison_table(result, budgets)
    minutes = (time.perf_counter() - started) / 60
    report = (
        f"# rnnopt demo\n\n{title}. The rule was meta-trained on {len(splits.train.classes)} other "
        f"modules for {META_STEPS} meta-steps and has nothing to tune; AdamW has the best of "
        f"{len(comparison.rates_of('adamw'))} learning rates at every budget of steps. Intervals "
        f"are 95 %. Seed {seed}, {minutes:.1f} minutes.\n\n{table}\n![](comparison.png)\n"
    )
    write_atomically(folder / "report.md", report.encode())
    print(f"{title}\n\n{table}\n{folder / 'report.md'} and {folder / 'comparison.png'} tell more")

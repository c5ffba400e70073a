"""`rnnopt demo`: the whole way on an embedded default, with nothing to download.

The texts are docstrings of the Python standard library, the task is to tell from which module
one is; the encoder is a small BERT made from its config. What is shown is the method, not its
best figures: those need a pretrained encoder, see the README.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from rnnopt.cli.progress import progress_bar
from rnnopt.cli.settings.commands import Demo
from rnnopt.data.corpus import summary
from rnnopt.data.embedded import stdlib_splits
from rnnopt.data.splits import class_sketches
from rnnopt.evaluation.baselines import BASELINES
from rnnopt.evaluation.comparison import Comparison, default_budgets
from rnnopt.evaluation.journal import Journal
from rnnopt.evaluation.report.plot import plot_comparison
from rnnopt.evaluation.report.tables import comparison_table
from rnnopt.meta.settings import MetaTrainSettings, UnrollSettings
from rnnopt.meta.training import MetaTraining
from rnnopt.rules.files import SavedRule
from rnnopt.storage.files import claim_folder, write_atomically
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import small_bert
from rnnopt.tasks.text.tasks import TextTasks

WAYS, SHOTS, QUERIES, STEPS = 5, 5, 8, 10
MAX_LENGTH = 32  # tokens: a docstring's first words tell most
META_STEPS, META_LR = 60, 1e-2
EPISODES, TUNING_EPISODES = 30, 6


def run(settings: Demo) -> None:
    """Run the demo in the folder of --output."""
    demo(Path(settings.output), settings.seed)


def demo(folder: Path, seed: int = 0) -> None:
    """Meta-train, adapt to unseen classes, compare with tuned AdamW, report.

    Args:
        folder: gets ``report.md``, ``comparison.png``, the encoder and the run; must be absent or
            empty.
        seed: of everything random.

    Raises:
        InputError: the folder holds something.
    """
    claim_folder(folder)
    torch.set_num_threads(1)  # in a model so small, threads would mostly wait for each other
    started = time.perf_counter()
    splits = stdlib_splits(seed)
    print(f"docstrings of the standard library: {summary(splits.train)} to meta-train on")
    encoder = small_bert(splits.train.texts, seed=seed, folder=folder / "encoder")
    classifier = Classifier.load(encoder, ways=WAYS, **_options(seed))
    train, validation, test = (
        TextTasks(
            EpisodeSampler(corpus, ways=WAYS, shots=SHOTS, queries=QUERIES, seed=seed), classifier
        )
        for corpus in (splits.train, splits.validation, splits.test)
    )
    rule = _meta_train(train, validation, folder / "run", seed)
    budgets = default_budgets(STEPS)
    journal = Journal(folder / "comparison.runs.jsonl", {"seed": seed})
    print("adapting to unseen classes")
    with progress_bar("run") as bar:
        comparison = Comparison(
            classifier, rule, "demo", validation, test, budgets, ["adamw"], journal,
            tick=lambda name: bar.advance(comparison.planned),
        )  # fmt: skip
        result = comparison.run(EPISODES, TUNING_EPISODES)
    title = f"{WAYS}-way {SHOTS}-shot on modules never seen, {EPISODES} episodes"
    plot_comparison(result, title, folder / "comparison.png")
    table = comparison_table(result)
    minutes = (time.perf_counter() - started) / 60
    rates = len(BASELINES["adamw"].grid)
    report = f"""# rnnopt demo

{title}. The rule was meta-trained on {len(splits.train.classes)} other modules for {META_STEPS}
meta-steps and has nothing to tune; AdamW has the best of {rates} learning rates, chosen on
{len(splits.validation.classes)} more modules, at every budget of steps. Intervals are 95 %.
Seed {seed}, {minutes:.1f} minutes.

{table}
![](comparison.png)
"""
    write_atomically(folder / "report.md", report.encode())
    print(f"{title}\n\n{table}\n{folder / 'report.md'} and {folder / 'comparison.png'} tell more")


def _options(seed: int) -> dict[str, Any]:
    """How every classifier of the demo is loaded."""
    return {
        "tune": "full",
        "pooling": "mean",
        "max_length": MAX_LENGTH,
        "device": torch.device("cpu"),
        "seed": seed,
    }


def _meta_train(train: TextTasks, validation: TextTasks, folder: Path, seed: int) -> SavedRule:
    training = MetaTraining(
        train,
        validation,
        MetaTrainSettings(META_STEPS, UnrollSettings(STEPS), meta_lr=META_LR, seed=seed),
        folder,
        facts={"data": "stdlib"},
        training={"classes": class_sketches(train.sampler.corpus)},
    )
    with progress_bar("meta-step", META_STEPS) as bar:
        return training.run(lambda record: bar.at(record["meta_step"])).requires_grad_(False)

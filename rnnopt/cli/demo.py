"""`rnnopt demo`: the whole way on an embedded default, with nothing to download.

The texts are docstrings of the Python standard library, the task is to tell from which module
one is; the encoder is a small BERT made from its config. What is shown is the method, not its
best figures: those need a pretrained encoder, see the README.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from rnnopt.cli.progress import progress_bar
from rnnopt.cli.settings.commands import Demo
from rnnopt.data.corpus import summary
from rnnopt.data.embedded import stdlib_splits
from rnnopt.data.splits import Splits, class_sketches
from rnnopt.evaluation.baselines import BASELINES
from rnnopt.evaluation.comparison import Comparison, default_budgets
from rnnopt.evaluation.journal import Journal
from rnnopt.evaluation.report.plot import plot_comparison
from rnnopt.evaluation.report.tables import comparison_table, show
from rnnopt.meta.settings import SHIPPED, LearnedSettings, MetaTrainSettings, UnrollSettings
from rnnopt.meta.training import MetaTraining
from rnnopt.rules.classical import SGD
from rnnopt.rules.files import SavedRule
from rnnopt.storage.files import claim_folder, write_atomically
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import small_bert
from rnnopt.tasks.text.tasks import TextTasks

WAYS, SHOTS, QUERIES, STEPS = 5, 5, 8, 10
MAX_LENGTH = 32  # tokens: a docstring's first words tell most
META_STEPS, META_LR = 16, 2e-3
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
    small_bert(splits.train.texts, seed=seed, folder=folder / "encoder")
    train, validation, test = _tasks(splits, folder, seed)
    budgets = default_budgets(STEPS)
    with _adamw_in_a_second_process(folder, seed, budgets) as finish:
        rule = _meta_train(train, validation, folder / "run", seed)
        finish()
    print("adapting to unseen classes")
    with progress_bar("run") as bar:
        comparison = Comparison(
            test.learner, rule, "demo", validation, test, budgets, ["adamw"],
            _journal(folder, seed), tick=lambda name: bar.advance(comparison.planned),
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
    show(f"{title}\n\n{table}\n{folder / 'report.md'} and {folder / 'comparison.png'} tell more")


def _tasks(splits: Splits, folder: Path, seed: int) -> list[TextTasks]:
    """Training, validation and test tasks, for the encoder in the demo's folder."""
    classifier = Classifier.load(
        folder / "encoder", ways=WAYS, tune="full", pooling="mean", max_length=MAX_LENGTH,
        device=torch.device("cpu"), seed=seed,
    )  # fmt: skip
    return [
        TextTasks(
            EpisodeSampler(corpus, ways=WAYS, shots=SHOTS, queries=QUERIES, seed=seed), classifier
        )
        for corpus in (splits.train, splits.validation, splits.test)
    ]


def _journal(folder: Path, seed: int) -> Journal:
    return Journal(folder / "comparison.runs.jsonl", {"seed": seed})


@contextmanager
def _adamw_in_a_second_process(
    folder: Path, seed: int, budgets: Sequence[int]
) -> Iterator[Callable[[], None]]:
    """Run AdamW, which does not wait for a rule, on another core while one is meta-trained.

    The comparison finds the runs in the journal, and makes those that it does not find.

    Yields:
        A function that waits until the process has ended.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=_run_adamw, args=(folder, seed, budgets, EPISODES, TUNING_EPISODES), daemon=True
    )
    process.start()
    try:
        yield process.join
    finally:
        process.terminate()
        process.join()


def _run_adamw(
    folder: Path, seed: int, budgets: Sequence[int], episodes: int, tuning_episodes: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the first process, which ends this
    torch.set_num_threads(1)
    _, validation, test = _tasks(stdlib_splits(seed), folder, seed)
    # a comparison needs a rule: this one takes least time
    Comparison(
        test.learner, SGD(1.0), "none", validation, test, budgets, ["adamw"],
        _journal(folder, seed),
    ).run(episodes, tuning_episodes)  # fmt: skip


def _meta_train(train: TextTasks, validation: TextTasks, folder: Path, seed: int) -> SavedRule:
    training = MetaTraining(
        train,
        validation,
        MetaTrainSettings(
            META_STEPS,
            UnrollSettings(STEPS),
            meta_lr=META_LR,
            learned=LearnedSettings(origin=SHIPPED),
            seed=seed,
        ),
        folder,
        facts={"data": "stdlib"},
        training={"classes": class_sketches(train.sampler.corpus)},
    )
    with progress_bar("meta-step", META_STEPS) as bar:
        return training.run(lambda record: bar.at(record["meta_step"])).requires_grad_(False)

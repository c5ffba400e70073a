"""`rnnopt adapt`: a labelled file in, the folder of a classifier out."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rnnopt.cli.progress import progress_bar, waiting
from rnnopt.cli.settings.commands import Adapt
from rnnopt.cli.settings.files import SETTINGS_FILE, write_settings
from rnnopt.cli.settings.loading import (
    choose_device,
    choose_rule,
    choose_start,
    known_to,
    load_classifier,
    require_at_least,
)
from rnnopt.cli.until import (
    MOST_STEPS,
    STEPS,
    Watch,
    adapt_requirement,
    data_facts,
    judge_unseen,
    judged_facts,
    judgement_line,
    say_if_no_better,
    seen_line,
    steps_for,
    user_texts,
)
from rnnopt.data.corpus import Corpus, summary
from rnnopt.data.overlap import require_transfer, seen_in
from rnnopt.errors import InputError
from rnnopt.evaluation.report.report import ADAPT_FILE, write_report
from rnnopt.evaluation.report.tables import confusion_text, show
from rnnopt.meta.training import finite_or_none
from rnnopt.optim.arguments import LEAST_LR
from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.files import rule_fingerprint
from rnnopt.storage.files import claim_folder, write_atomically
from rnnopt.storage.provenance import write_provenance
from rnnopt.tasks.requirement import NOT_MET, Requirement
from rnnopt.tasks.text.adapt import fit, in_batches, judge_texts, label_numbers
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import encoder_name
from rnnopt.tasks.text.tasks import TextTask


@dataclass
class _Job:
    """What is adapted, on which texts.

    Attributes:
        classifier: with its first head.
        optimizer: over what trains.
        train, held_out: the user's texts.
        judge: what the texts held out are, for people: "held out" or "--test".
        labels, held_out_labels: (B,), their classes' numbers.
        names: of the classes.
        seen: what meta-training has seen of them.
        rule: by what a report names it.
    """

    classifier: Classifier
    optimizer: LearnedOptimizer
    train: Corpus
    held_out: Corpus
    judge: str
    labels: np.ndarray
    held_out_labels: np.ndarray
    names: list[str]
    seen: Any
    rule: str


def run(settings: Adapt) -> int:
    """Adapt, judge, save.

    Returns:
        The exit code: 0, or `NOT_MET`.
    """
    requirement = adapt_requirement(settings)
    require_at_least(1, settings, "steps", "batch_size", "validate_every")
    _check_lr(settings.lr)
    with waiting("reading data and encoder"):
        job = _job(settings)
    steps = settings.steps
    if steps is None:
        least = STEPS if requirement is None else MOST_STEPS
        steps = steps_for(len(job.train), settings.batch_size, least)
    settings = replace(settings, steps=steps)
    folder = Path(settings.output)
    claim_folder(folder)
    print(f"training: {summary(job.train)}\n{job.judge}: {summary(job.held_out)}")
    losses, seconds, watch = _fit(settings, steps, job, requirement)
    report = {
        **_judge(job, losses),
        "judged_by": job.judge,
        "steps": len(losses),
        "seconds": round(seconds, 2),
        "losses": finite_or_none(losses),
        "undone": job.optimizer.undone,
        "seen": job.seen,
    }
    job.classifier.save(folder, job.names)
    data = {
        "training": data_facts(job.train),
        job.judge: data_facts(job.held_out),
        "rule": job.rule,
        "encoder": f"{encoder_name(settings.encoder)}, {job.classifier.fingerprint}",
    }
    if watch is not None:
        report["requirement"] = watch.report()
        show(confusion_text(job.names, np.array(report["confusion"])))
        if settings.test:
            _test(settings.test, folder, report, settings, data, job)
    print(f"report: {_write(folder, report, settings, data)}")
    print(f'load it with transformers.pipeline("text-classification", "{folder}", truncation=True)')
    return NOT_MET if watch is not None and watch.met_step is None else 0


def _check_lr(lr: float) -> None:
    """Refuse what no rule learns with: a learning rate of AdamW's, in most cases."""
    if not LEAST_LR <= lr < math.inf:
        raise InputError(
            f"--lr {lr}: must be finite and at least {LEAST_LR}; it multiplies the learned step, "
            "and 1 is as meta-trained: leave it out, or take a value near 1"
        )


def _job(settings: Adapt) -> _Job:
    """Read and load all that adaptation needs; nothing is written yet."""
    device = choose_device(settings.device)
    file, rule = choose_rule(settings.rule, device)
    train, held_out = user_texts(settings)
    names, labels, held_out_labels = label_numbers(train, held_out)
    classes = {
        name: sketch for facts in known_to(settings) for name, sketch in seen_in(facts).items()
    }
    seen = require_transfer({"classes": classes}, train, settings.data, settings.allow_overlap)
    classifier = load_classifier(settings, len(names), device, settings.kind)
    start = choose_start(settings, classifier)
    support = in_batches(classifier, train.texts, labels)
    start.begin(classifier, TextTask(classifier, (support,), support, len(names)), settings.seed)
    return _Job(
        classifier,
        start.optimizer(classifier, rule, lr=settings.lr),
        train,
        held_out,
        "--test" if settings.test and settings.until is None else "held out",
        labels,
        held_out_labels,
        names,
        seen,
        f"{file}, {rule_fingerprint(rule)}",
    )


def _fit(
    settings: Adapt, steps: int, job: _Job, requirement: Requirement | None
) -> tuple[list[float], float, Watch | None]:
    """Adapt.

    Returns:
        (the loss before each step, the seconds, what watched the requirement).
    """
    watch = None
    if requirement is not None:
        watch = Watch(
            job.classifier, job.held_out, job.held_out_labels, requirement,
            settings.validate_every, steps, print,
        )  # fmt: skip
    started = time.perf_counter()
    with progress_bar("step", steps) as bar:

        def tick(loss: float) -> bool:
            bar.advance(note=f"loss {loss:.3f}")
            return watch is not None and watch()

        losses = fit(
            job.classifier,
            job.optimizer,
            job.train.texts,
            job.labels,
            steps=steps,
            batch_size=settings.batch_size,
            seed=settings.seed,
            tick=tick,
        )
    seconds = time.perf_counter() - started
    if watch is not None:
        watch.restore()
    print(seen_line(len(job.train), settings.batch_size, len(losses)))
    return losses, seconds, watch


def _judge(job: _Job, losses: list[float]) -> dict[str, Any]:
    """Judge by the texts held out, and tell; the figures for a file."""
    with waiting("judging"):
        judged = judge_texts(job.classifier, job.held_out.texts, job.held_out_labels)
    if job.optimizer.undone:
        print(
            f"{job.optimizer.undone} steps were undone, since they made the loss climb; Adam went "
            "on in the rule's place"
        )
    print("loss before each step: " + " ".join(f"{loss:.3f}" for loss in losses))
    print(judgement_line(judged, "of --test" if job.judge == "--test" else job.judge))
    say_if_no_better(judged, job.names, print)
    return judged_facts(judged, job.names)


def _test(
    path: str,
    folder: Path,
    report: dict[str, Any],
    settings: Adapt,
    data: dict[str, Any],
    job: _Job,
) -> None:
    """Add what the test file says to the report, now that all else is done and safe."""
    _write(folder, report, settings, data)
    try:
        report["test"], data["test"] = judge_unseen(
            settings, path, job.classifier, job.train, job.held_out
        )
    except InputError as error:
        raise InputError(
            f"{error}; the classifier is saved in {folder}, and its report beside it"
        ) from error


def _write(folder: Path, report: dict[str, Any], settings: Adapt, data: dict[str, Any]) -> Path:
    """What adaptation found, into its folder; the report's path."""
    content = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / ADAPT_FILE, content.encode())
    write_settings(folder / SETTINGS_FILE, settings)
    write_provenance(folder, settings.command, vars(settings), data)
    return write_report(folder)

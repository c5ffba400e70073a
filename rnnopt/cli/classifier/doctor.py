"""`rnnopt doctor`: what `rnnopt fit` would do, and what has to be mended before it can."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rnnopt.cli.classifier.forecast import forecast
from rnnopt.cli.classifier.labelled import LabelledTexts, read_labelled
from rnnopt.cli.classifier.model import unfitted
from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.classifier import Doctor
from rnnopt.errors import InputError
from rnnopt.storage.memory import free_bytes, peak_bytes
from rnnopt.storage.provenance import versions
from rnnopt.tasks.text.encoder.loading import encoder_name
from rnnopt.tasks.text.encoder.sentence import SentenceEncoder
from rnnopt.tasks.text.estimator.adaptation import least_seconds
from rnnopt.tasks.text.estimator.folder import check_new
from rnnopt.tasks.text.estimator.inputs.labelled import Labels, check_texts, read_labels
from rnnopt.tasks.text.estimator.inputs.settings import check_for_several_labels, check_settings
from rnnopt.tasks.text.estimator.objective.choice import objective_of
from rnnopt.tasks.text.estimator.report import spread
from rnnopt.tasks.text.estimator.steps import Plan

_TIMED = 64  # texts of the timed forward pass
_UNEVEN = 10  # times as many texts of one label as of another, from where on it is worth a word
_MISTAKE = 2


@dataclass
class _Checks:
    """Runs checks and remembers whether something has to be mended."""

    failed: bool = False

    def run(self, name: str, check: Callable[[], Any]) -> Any:
        """The check's value, or None where it fails; its error is printed."""
        try:
            return check()
        except InputError as error:
            self.failed = True
            print(f"problem  {name}: {error}")
            return None


def run(settings: Doctor) -> int:
    """Check everything that can be checked, also behind a problem.

    Returns:
        The exit code: 0, or 2 where something has to be mended.
    """
    checks = _Checks()
    checks.run("machine", _machine)
    checks.run("settings", lambda: _settings(settings))
    with waiting("reading the encoder"):
        encoder = checks.run("encoder", lambda: _encoder(settings))
    found = checks.run("data", lambda: read_labelled(settings.data, settings))
    labels = checks.run("data", lambda: _data(settings, found)) if found else None
    if labels is not None and encoder is not None:
        texts = check_texts(found.texts)
        checks.run("time", lambda: _time(settings, encoder, texts, labels))
    if checks.failed:
        print("mend what is a problem, and run rnnopt doctor again")
        return _MISTAKE
    return 0


def _machine() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    free = free_bytes(torch.device("cpu"))
    memory = "" if free is None else f", {free / 1e9:.1f} GB of memory free"
    print(f"ok       machine: {cores} cores, {torch.get_num_threads()} threads{gpu}{memory}")
    print(f"ok       libraries: {libraries} on {platform.system()}")


def _settings(settings: Doctor) -> None:
    classifier = unfitted(settings)
    check_settings(classifier.get_params(deep=False))
    if settings.output is not None:
        check_new(settings.output)
    print(f"ok       settings: rule {settings.rule or 'that ships'}, seed {settings.seed}")


def _encoder(settings: Doctor) -> SentenceEncoder:
    device = unfitted(settings).torch_device()
    encoder = SentenceEncoder.load(settings.encoder, device, settings.pooling, settings.max_length)
    count = sum(param.numel() for param in encoder.parameters())
    layout = encoder.layout
    scaled = ", scaled to length 1" if layout.normalized else ""
    print(
        f"ok       encoder: {encoder_name(settings.encoder)}, {encoder.encoder.config.model_type} "
        f"of {count / 1e6:.1f} million parameters on {device.type}; vectors of {encoder.width} by "
        f"the pooling {layout.pooling} ({layout.source}){scaled}; texts of {layout.max_length} "
        "tokens at most"
    )
    return encoder


def _data(settings: Doctor, found: LabelledTexts) -> Labels:
    labels = read_labels(list(found.labels), len(found.texts))
    if labels.several:
        check_for_several_labels(unfitted(settings).get_params(deep=False))
    counts = objective_of(labels.places).counts(labels.places)
    print(f"ok       data: {found.summary}; {spread(counts.min(), counts.max())} a label")
    if settings.abstain is not None and counts.max() == 1:
        raise InputError(
            f"--abstain is {settings.abstain}, and every label has one text, so that none can be "
            "held out to choose by; give labels two texts or more, or use --abstain-below"
        )
    single = int((counts == 1).sum())
    if single:
        print(
            f"note     data: {single} of {len(counts)} labels have one text, which can't be held "
            "out: how well they are told apart is not measured"
        )
    uneven = counts.max() >= _UNEVEN * counts.min() and not labels.several
    if uneven and settings.class_weight is None:
        print("note     data: labels are uneven; --class-weight balanced makes them count alike")
    return labels


def _time(settings: Doctor, encoder: SentenceEncoder, texts: list[str], labels: Labels) -> None:
    most = encoder.layout.max_length
    cut = sum(length >= most for length in encoder.tokens().lengths(texts))
    if cut:
        print(
            f"note     data: {cut} of {len(texts)} texts fill the {most} tokens that are read; "
            "what is longer is cut off"
        )
    sample = (texts * _TIMED)[:_TIMED]
    with waiting("timing"):
        took = min(_seconds(lambda: encoder.embed(sample)) for _ in range(2))
        forward = took / len(sample)
        plan = Plan(
            settings.rule, settings.steps, settings.lora_rank, settings.seconds, settings.seed
        )
        try:
            ahead = forecast(encoder, texts, labels.places, plan, forward)
            why = ""
        except InputError as error:
            ahead, why = None, f"this encoder can't be adapted: {error}"
    memory = peak_bytes(torch.device("cpu"))
    shown = "" if memory is None else f"; peak memory so far {memory / 1e6:.0f} MB"
    print(f"ok       time: {1000 * forward:.1f} ms a text, without a gradient{shown}")
    embedding = len(texts) * forward
    start = f"embed {len(texts)} texts in about {embedding:.1f} s, fit logistic regression"
    if ahead is not None and ahead.folds:
        print(
            f"plan     {start}, adapt in {ahead.folds} folds and once to all texts, "
            f"{ahead.steps} steps of about {ahead.step:.2f} s each: about "
            f"{embedding + ahead.seconds:.0f} s together"
        )
        if ahead.steps < settings.steps:
            print(
                f"note     time: --seconds {settings.seconds:g} allow {ahead.steps} of the "
                f"{settings.steps} steps; give more to take all of them"
            )
        return
    if not settings.steps:
        why = "--steps is 0"
    elif not why and max(objective_of(labels.places).counts(labels.places)) == 1:
        why = "every label has one text, and none can be held out"
    elif not why and ahead is not None:
        needed = least_seconds(plan, ahead.step)
        why = f"that takes {needed:.0f} s or more, and --seconds is {settings.seconds:g}"
    print(f"plan     {start}, and leave the encoder as it is ({why})")


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started

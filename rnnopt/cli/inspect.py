"""`rnnopt inspect`: what a rule has learned."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from rnnopt.cli.progress import waiting
from rnnopt.cli.settings.commands import Inspect
from rnnopt.cli.settings.loading import (
    choose_device,
    choose_rule,
    episode_sampler,
    load_classifier,
    read_data,
    require_at_least,
)
from rnnopt.data.corpus import Corpus
from rnnopt.errors import InputError
from rnnopt.evaluation.inspection import inspect_rule, inspection_text
from rnnopt.storage.files import write_atomically
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import encoder_name, small_bert
from rnnopt.tasks.text.tasks import TextTasks

SUFFIXES = (".png", ".json")


def run(settings: Inspect) -> None:
    """Print the tables, and draw or write them where --output says so."""
    require_at_least(1, settings, "steps")
    output = None if settings.output is None else Path(settings.output)
    if output is not None and output.suffix not in SUFFIXES:
        raise InputError(f"--output {output}: its name must end in {' or '.join(SUFFIXES)}")
    with waiting("reading data and encoder"):
        device = choose_device(settings.device)
        _, rule = choose_rule(settings.rule, device)
        corpus = read_data(settings).test
        classifier = _classifier(settings, corpus, device)
    task = TextTasks(episode_sampler(settings, corpus), classifier).load(0)
    classifier.reset(task.ways, seed=settings.seed)
    with waiting("adapting"):
        found = inspect_rule(
            rule, classifier, task, settings.steps, settings.kind_of_tensor, settings.at_step
        )
    print(inspection_text(found))
    if output is None:
        return
    if output.suffix == ".json":
        write_atomically(output, (json.dumps(asdict(found), indent=1) + "\n").encode())
        return
    from rnnopt.evaluation.report.plot import plot_inspection  # the tables above need no matplotlib

    encoder = "a small random BERT" if settings.encoder is None else encoder_name(settings.encoder)
    title = f"{settings.ways}-way {settings.shots}-shot, {encoder}, {settings.tune}"
    plot_inspection(found, title, output)


def _classifier(settings: Inspect, corpus: Corpus, device: torch.device) -> Classifier:
    """Of --encoder, or of a random BERT that knows the words."""
    if settings.encoder is not None:
        return load_classifier(settings, settings.ways, device, settings.kind)
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, encoder=str(small_bert(corpus.texts, folder=folder)))
        return load_classifier(settings, settings.ways, device, settings.kind)

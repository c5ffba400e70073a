"""What `rnnopt inspect` does."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from rnnopt.cli.options import (
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


def inspect(options: Namespace) -> None:
    """`rnnopt inspect`."""
    require_at_least(1, options, "steps")
    output = None if options.output is None else Path(options.output)
    if output is not None and output.suffix not in SUFFIXES:
        raise InputError(f"--output {output}: its name must end in {' or '.join(SUFFIXES)}")
    corpus = read_data(options).test
    classifier = _classifier(options, corpus)
    _, rule = choose_rule(options, [param for _, param in classifier.trainable()])
    task = TextTasks(episode_sampler(options, corpus), classifier).load(0)
    classifier.reset(task.ways, seed=options.seed)
    found = inspect_rule(rule, classifier, task, options.steps, options.kind, options.at_step)
    print(inspection_text(found))
    if output is None:
        return
    if output.suffix == ".json":
        write_atomically(output, (json.dumps(asdict(found), indent=1) + "\n").encode())
        return
    from rnnopt.evaluation.report.plot import plot_inspection  # the tables above need no matplotlib

    encoder = "a small random BERT" if options.encoder is None else encoder_name(options.encoder)
    title = f"{options.ways}-way {options.shots}-shot, {encoder}, {options.tune}"
    plot_inspection(found, title, output)


def _classifier(options: Namespace, corpus: Corpus) -> Classifier:
    """Of --encoder, or of a random BERT that knows the words."""
    device = choose_device(options.device)
    if options.encoder is not None:
        return load_classifier(options, options.ways, device)
    with tempfile.TemporaryDirectory() as folder:
        options = Namespace(**{**vars(options), "encoder": small_bert(corpus.texts, folder=folder)})
        return load_classifier(options, options.ways, device)

"""`rnnopt fit`: a labelled file in, the folder of a `TextClassifier` out."""

from __future__ import annotations

from typing import Any

from rnnopt.cli.classifier.labelled import read_labelled
from rnnopt.cli.classifier.model import unfitted
from rnnopt.cli.progress import Bar, progress_bar, waiting
from rnnopt.cli.settings.classifier import Fit
from rnnopt.errors import InputError
from rnnopt.tasks.text.estimator.export.onnx import onnx_runtime
from rnnopt.tasks.text.estimator.folder import check_new


def run(settings: Fit) -> None:
    """Fit, tell what was done and why, save."""
    folder = check_new(settings.output)
    if settings.onnx is not None:
        onnx_runtime()
        if check_new(settings.onnx).resolve() == folder.resolve():
            raise InputError(f"--output and --onnx are both {folder}; choose two folders")
    found = read_labelled(settings.data, settings)
    print(found.summary)
    with progress_bar("fitting, step") as bar:
        classifier = unfitted(settings).fit(
            found.texts, found.labels, report=lambda record: _show(record, bar)
        )
    print(classifier.report_)
    classifier.save(folder)
    if settings.onnx is not None:
        with waiting("exporting"):
            report = classifier.export_onnx(settings.onnx, found.texts, found.labels)
        print(f"{settings.onnx}, compared on the texts that it was fitted on:\n{report}")
    print(f'next: rnnopt predict --model {folder} --text "..."')


def _show(record: dict[str, Any], bar: Bar) -> None:
    """A record of `TextClassifier.fit`: a step of a fold, or of the adaptation to all texts."""
    if "fold" in record:
        where = f"fold {record['fold']}" if record["fold"] else "all texts"
        bar.advance(note=f"adapting to {where}, loss {record['loss']:.3f}")

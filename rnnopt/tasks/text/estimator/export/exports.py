"""How a fitted `rnnopt.TextClassifier` leaves the process: folders, the hub, ONNX, transformers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rnnopt.tasks.text.estimator import folder as folders
from rnnopt.tasks.text.estimator.export import hub, onnx, pipeline
from rnnopt.tasks.text.estimator.export.onnx import OnnxReport
from rnnopt.tasks.text.estimator.inputs.labelled import check_texts, known_labels
from rnnopt.tasks.text.estimator.inputs.settings import plain


class Exports(ABC):
    """The methods of a classifier that write it."""

    @abstractmethod
    def _fitted(self) -> folders.Fitted: ...

    @abstractmethod
    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings, as scikit-learn has it."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `load` reads, and whose encoder sentence-transformers loads.

        It holds safetensors, JSON and a model card, and appears whole or not at all.

        Args:
            folder: absent or empty.

        Raises:
            NotFittedInputError: before `fit`.
            InputError: a folder with something in it, or one that can't be written.
        """
        folders.save(Path(folder), self._fitted(), plain(self.get_params(deep=False)))

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        token: str | None = None,
        message: str = "A text classifier of rnnopt",
    ) -> str:
        """Put the folder of `save` on the Hugging Face hub, as a new commit.

        Args:
            name: ``owner/name``; made if it is not there.
            private: whether only the owner sees it, if it is made.
            token: of the hub; None for the one that is logged in.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            NotFittedInputError: before `fit`.
            InputError: the hub refuses, or can't be reached.
        """
        fitted = self._fitted()
        with TemporaryDirectory() as made:
            folder = Path(made) / "classifier"
            folders.save(folder, fitted, plain(self.get_params(deep=False)), name)
            return hub.push(folder, name, private, token, message)

    def export_onnx(
        self,
        folder: str | os.PathLike[str],
        texts: Sequence[str] | None = None,
        labels: Sequence[Any] | None = None,
        int8: bool = True,
    ) -> OnnxReport:
        """Write files that onnxruntime runs, with the same logits to 1e-4.

        `folder` gets ``model.onnx``, from tokens to logits, with weights of 8 bits
        ``model_int8.onnx``, the tokenizer, the labels, and a page that says how to run them.

        Args:
            folder: absent or empty.
            texts: to compare by; None for a few short ones.
            labels: of the texts; then accuracies are told, too.
            int8: whether to write the file of 8 bits.

        Returns:
            How far the files agree with the classifier.

        Raises:
            NotFittedInputError: before `fit`.
            InputError: onnx is not installed, the folder has something in it, or this encoder
                can't be exported with the same logits.
        """
        fitted = self._fitted()
        texts = None if texts is None else check_texts(texts)
        places = None
        if texts is not None and labels is not None:
            several = fitted.decision.thresholds is not None
            places = known_labels(labels, len(texts), fitted.decision.classes, several)
        return onnx.export(fitted, Path(folder), texts, places, int8)

    def export_transformers(
        self, folder: str | os.PathLike[str], texts: Sequence[str] | None = None
    ) -> float:
        """Write a model for ``transformers.pipeline("text-classification", folder)``.

        There is one for vectors of the first token (``pooling="cls"``) that are not scaled to
        length 1, see `rnnopt.tasks.text.estimator.export.pipeline`. Thresholds and abstention are
        left out: the pipeline gives probabilities alone.

        Args:
            folder: absent or empty.
            texts: to compare by; None for a few short ones.

        Returns:
            The largest difference of a logit from the classifier's.

        Raises:
            NotFittedInputError: before `fit`.
            InputError: the folder has something in it, or this encoder has no such model.
        """
        texts = None if texts is None else check_texts(texts)
        return pipeline.export(self._fitted(), Path(folder), texts)

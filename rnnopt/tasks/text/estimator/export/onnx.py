"""A fitted classifier as one ONNX graph, from tokens to logits, checked with onnxruntime.

Shapes: B texts, S tokens, C classes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.storage.files import write_atomically
from rnnopt.tasks.text.encoder.loading import first_line, silence
from rnnopt.tasks.text.encoder.sentence import SentenceEncoder
from rnnopt.tasks.text.estimator.export.agreement import require_agreement
from rnnopt.tasks.text.estimator.folder import Fitted, new_folder

MODEL_FILE, INT8_FILE = "model.onnx", "model_int8.onnx"
FACTS_FILE, CARD_FILE = "onnx.json", "README.md"
_OPSET = 17
_BATCH = 32
_PROBES = ("a", "two words", "this text is longer than the others, so that they are padded", "")


@dataclass(frozen=True)
class OnnxReport:
    """How well exported files agree with the classifier.

    Attributes:
        texts: how many were compared.
        difference: the largest difference of a logit between `MODEL_FILE` and the classifier.
        bytes, int8_bytes: sizes of the files; None without int8.
        int8_difference: the largest difference of a logit of `INT8_FILE`.
        int8_agreement: share of texts with the same answer from `INT8_FILE`.
        accuracy, int8_accuracy: share of right answers; None where no labels were given.
    """

    texts: int
    difference: float
    bytes: int
    int8_bytes: int | None = None
    int8_difference: float | None = None
    int8_agreement: float | None = None
    accuracy: float | None = None
    int8_accuracy: float | None = None

    def __str__(self) -> str:
        right = "" if self.accuracy is None else f", accuracy {self.accuracy:.3f}"
        lines = [
            f"{MODEL_FILE}: {self.bytes / 1e6:.1f} MB, logits within {self.difference:.1e} on "
            f"{self.texts} texts{right}"
        ]
        if self.int8_bytes is not None:
            right = "" if self.int8_accuracy is None else f", accuracy {self.int8_accuracy:.3f}"
            lines.append(
                f"{INT8_FILE}: {self.int8_bytes / 1e6:.1f} MB, the same answer on "
                f"{self.int8_agreement:.3f} of them{right}"
            )
        return "\n".join(lines)


class _Graph(nn.Module):
    """Encoder, pooling and head.

    Args:
        fitted: has them.
        names: of the inputs, in their order.
        centre: (H,), of embeddings, see `LinearHead.around`.
    """

    centre: Tensor

    def __init__(self, fitted: Fitted, names: Sequence[str], centre: np.ndarray) -> None:
        super().__init__()
        self.encoder, self.names = fitted.encoder, tuple(names)
        head = fitted.head.around(centre)
        self.head = nn.Linear(head.weight.shape[1], len(head.bias))
        self.register_buffer("centre", torch.from_numpy(centre))
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(head.weight))
            self.head.bias.copy_(torch.from_numpy(head.bias))

    def forward(self, *inputs: Tensor) -> Tensor:
        vectors = self.encoder(dict(zip(self.names, inputs)))
        logits: Tensor = self.head(vectors - self.centre)
        return logits


def export(
    fitted: Fitted,
    folder: str | Path,
    texts: Sequence[str] | None,
    places: np.ndarray | None,
    int8: bool,
) -> OnnxReport:
    """Write `MODEL_FILE`, `INT8_FILE`, the tokenizer, `FACTS_FILE` and a page on how to run them.

    The folder appears whole or not at all, and only if onnxruntime gives the classifier's logits
    within what `require_agreement` allows.

    Args:
        fitted: the classifier.
        folder: absent or empty.
        texts: to compare by; None for the labels and a few texts of several lengths.
        places: their classes by place, or (B, C) zeros and ones; None where they are not known.
        int8: whether to write `INT8_FILE`, with weights of 8 bits (onnxruntime's dynamic
            quantisation).

    Raises:
        InputError: the packages are missing, the folder can't be written, or this encoder can't be
            exported with the same logits.
    """
    runtime = onnx_runtime()
    probes = [*_PROBES, *map(str, fitted.decision.classes.tolist()[:28])]
    texts = probes if texts is None else list(texts)
    if not texts:
        raise InputError("there are 0 texts to compare by; give at least one, or None")
    with new_folder(folder) as partial:
        vectors = fitted.encoder.embed(texts).numpy()
        names = _write_graph(fitted, partial / MODEL_FILE, vectors.mean(axis=0))
        wanted = fitted.head.logits(vectors)
        found = run(runtime, partial / MODEL_FILE, fitted.encoder, texts)
        difference = require_agreement(found, wanted, _kind(fitted))
        report = OnnxReport(
            len(texts), difference, (partial / MODEL_FILE).stat().st_size,
            accuracy=_accuracy(fitted, found, places),
        )  # fmt: skip
        if int8:
            report = _quantised(runtime, fitted, partial, texts, places, report, wanted)
        with silence():
            fitted.encoder.tokenizer.save_pretrained(partial)
        _write_facts(fitted, partial, names, report)
    return report


def run(runtime: Any, path: Path, encoder: SentenceEncoder, texts: Sequence[str]) -> np.ndarray:
    """Logits (B, C) of texts by onnxruntime, on the CPU."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about graphs that it improves by itself
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    cache, made = encoder.tokens(), []
    for start in range(0, len(texts), _BATCH):
        batch = cache.batch(texts[start : start + _BATCH])
        made.append(session.run(None, {name: ids.numpy() for name, ids in batch.items()})[0])
    return np.concatenate(made).astype(np.float64)


def _write_graph(fitted: Fitted, path: Path, centre: np.ndarray) -> list[str]:
    """Write the graph; returns the names of its inputs."""
    batch = fitted.encoder.tokens().batch(_PROBES[:3])
    names = list(batch)
    device = fitted.encoder.device
    graph = _Graph(fitted, names, centre).eval()
    axes = {name: {0: "texts", 1: "tokens"} for name in names} | {"logits": {0: "texts"}}
    try:
        with _quiet(), torch.no_grad():
            # The exporter by tracing takes a tenth of the time of the new one, and needs one
            # package less. What tracing gets wrong shows when the logits are compared.
            torch.onnx.export(
                graph.cpu(), tuple(batch.values()), str(path), input_names=names,
                output_names=["logits"], dynamic_axes=axes, opset_version=_OPSET, dynamo=False,
            )  # fmt: skip
    except Exception as error:  # torch raises errors of many kinds, and so do models
        raise InputError(
            f"torch can't export this encoder ({_kind(fitted)}): {first_line(error)}; use another"
        ) from error
    finally:
        fitted.encoder.to(device)
    return names


def _quantised(
    runtime: Any, fitted: Fitted, folder: Path, texts: list[str], places: np.ndarray | None,
    report: OnnxReport, wanted: np.ndarray,
) -> OnnxReport:  # fmt: skip
    """Write `INT8_FILE`, and say how well it does."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            str(folder / MODEL_FILE), str(folder / INT8_FILE), weight_type=QuantType.QInt8
        )
    found = run(runtime, folder / INT8_FILE, fitted.encoder, texts)
    same = [a == b for a, b in zip(*(fitted.decision.answers(part) for part in (found, wanted)))]
    return OnnxReport(
        report.texts, report.difference, report.bytes, (folder / INT8_FILE).stat().st_size,
        float(np.abs(found - wanted).max()), float(np.mean(same)), report.accuracy,
        _accuracy(fitted, found, places),
    )  # fmt: skip


def _accuracy(fitted: Fitted, logits: np.ndarray, places: np.ndarray | None) -> float | None:
    if places is None:
        return None
    if places.ndim == 1:
        return float((logits.argmax(axis=1) == places).mean())
    yes = fitted.decision.objective.probabilities(logits) >= fitted.decision.thresholds
    return float((yes == places).all(axis=1).mean())


def _write_facts(fitted: Fitted, folder: Path, names: list[str], report: OnnxReport) -> None:
    decision, encoder = fitted.decision, fitted.encoder
    facts = {
        "inputs": names,
        "output": "logits",
        "max_length": encoder.layout.max_length,
        "classes": decision.classes.tolist(),
        "thresholds": None if decision.thresholds is None else decision.thresholds.tolist(),
        "floor": decision.floor,
        "report": asdict(report),
    }
    content = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / FACTS_FILE, content.encode())
    write_atomically(folder / CARD_FILE, _card(fitted, names, report).encode())


def _card(fitted: Fitted, names: list[str], report: OnnxReport) -> str:
    last = (
        "1 / (1 + np.exp(-logits)) >= np.array(facts['thresholds'])  # (texts, labels)"
        if fitted.decision.thresholds is not None
        else "[facts['classes'][i] for i in logits.argmax(axis=1)]"
    )
    parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    inputs = ", ".join(
        f'"{name}": np.array([e.{parts[name]} for e in encoded], dtype=np.int64)' for name in names
    )
    side, pad = fitted.encoder.tokenizer.padding_side, fitted.encoder.tokenizer.pad_token_id
    padding = f'direction="{side}", pad_id={pad}'
    return f"""# A text classifier in ONNX

```python
import json
from pathlib import Path
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

facts = json.loads(Path("{FACTS_FILE}").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation(facts["max_length"])
tokenizer.enable_padding({padding})
encoded = tokenizer.encode_batch(["..."])
session = onnxruntime.InferenceSession("{MODEL_FILE}")
(logits,) = session.run(None, {{{inputs}}})
answers = {last}
```

{report}
"""


def _kind(fitted: Fitted) -> str:
    return str(fitted.encoder.encoder.config.model_type)


def onnx_runtime() -> Any:
    """The module onnxruntime.

    Raises:
        InputError: it is not installed, or onnx is not.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise InputError('ONNX needs two packages more: pip install "rnnopt[onnx]"') from error
    return onnxruntime


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch and onnxruntime about tracing and quantising as such."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

"""What `TextClassifier.fit` did, and why; and the card of a saved classifier."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rnnopt.data.corpus import counted
from rnnopt.tasks.text.estimator.evidence import Evidence


@dataclass(frozen=True)
class Report:
    """What `fit` did, and why. `print` shows it in a few lines.

    Attributes:
        kept: what classifies: the start, or so many steps of adaptation.
        reason: why that one.
        encoder: a short name of it.
        pooling: how the encoder's tokens become one vector, and where that is from.
        texts, classes: how many; `fewest` and `most` are texts of a class.
        folds: of the cross-validation that compared adaptation with the start.
        accuracy, log_loss: of what was kept, on texts held out; None where each label has one
            text. The same texts chose it and its temperature, so that both flatter a little.
        temperature: that the logits were divided by.
        tried: evidence for all that was compared.
        seconds: what `fit` took.
        data: fingerprint of texts and labels.
        micro_f1, macro_f1: on texts held out, where a text may have several labels; else None.
            The thresholds of a fifth were chosen on the other four.
        floor: the largest logit below which there is no answer; None where there is always one.
        answered: share of the texts held out with an answer, and `answered_accuracy` that of right
            ones among them.
        memory: bytes that the process took at most until the end of `fit`; None where the system
            doesn't tell.
    """

    kept: str
    reason: str
    encoder: str
    pooling: str
    texts: int
    classes: int
    fewest: int
    most: int
    folds: int
    accuracy: float | None
    log_loss: float | None
    temperature: float
    tried: tuple[Evidence, ...]
    seconds: float
    data: str
    micro_f1: float | None = None
    macro_f1: float | None = None
    floor: float | None = None
    answered: float | None = None
    answered_accuracy: float | None = None
    memory: int | None = None

    def __str__(self) -> str:
        memory = "" if self.memory is None else f", at most {self.memory / 1e6:.0f} MB of memory"
        more = ""
        if self.micro_f1 is not None:
            more = (
                f"several labels a text: micro F1 {self.micro_f1:.3f}, macro F1 "
                f"{self.macro_f1:.3f} on texts held out\n"
            )
        if self.answered is not None:
            more += (
                f"no answer where the largest logit is below {self.floor:.2f}: {self.answered:.3f} "
                f"of the texts held out have one, and {self.answered_accuracy:.3f} of these are "
                "right\n"
            )
        return (
            f"kept {self.kept}: {self.reason}\n{more}"
            f"{self.texts} texts, {self.classes} classes with {spread(self.fewest, self.most)} each"
            f"; {self.encoder}, pooling {self.pooling}; {self.seconds:.1f} s{memory}"
        )

    def facts(self) -> dict[str, Any]:
        """JSON-compatible."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Report:
        """The inverse of `facts`."""
        tried = tuple(Evidence(**evidence) for evidence in facts["tried"])
        return cls(**{**facts, "tried": tried})


def spread(fewest: int, most: int) -> str:
    """How many texts classes have, in words."""
    return counted(most, "text") if fewest == most else f"{fewest} to {most} texts"


def card(report: Report, classes: list[str], versions: dict[str, str], name: str = "FOLDER") -> str:
    """The model card of a saved classifier, as Markdown with the hub's header.

    Args:
        report: of its `fit`.
        classes: the labels as text.
        versions: of libraries.
        name: of the folder, or on the hub.
    """
    shown = ", ".join(f"`{name}`" for name in classes[:20])
    more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
    judged = "no text could be held out, since every label has one"
    if report.accuracy is not None:
        judged = f"accuracy {report.accuracy:.3f}, log loss {report.log_loss:.3f} nats a text"
    if report.micro_f1 is not None:
        judged = (
            f"micro F1 {report.micro_f1:.3f}, macro F1 {report.macro_f1:.3f}, all labels right "
            f"{report.accuracy:.3f}, log loss {report.log_loss:.3f} nats a text"
        )
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: text-classification
tags: [rnnopt, few-shot]
---

# A text classifier of {report.classes} classes

```python
from rnnopt import TextClassifier

TextClassifier.from_pretrained("{name}").predict(["..."])
```

The encoder alone is loaded by `SentenceTransformer("{name}")`. `head.safetensors` holds the linear
head on its vectors, and `classifier.json` the labels.

| | |
|---|---|
| labels | {shown}{more} |
| encoder | {report.encoder} |
| pooling | {report.pooling} |
| kept | {report.kept} |
| why | {report.reason} |
| fitted on | {report.texts} texts, {spread(report.fewest, report.most)} a class |
| fingerprint of the data | {report.data} |
| on texts held out in cross-validation | {judged} |
| temperature of the probabilities | {report.temperature:.3g} |
| made with | {libraries} |

## Limits

- The figures above are from the texts that it was fitted on, by cross-validation. The same texts
  chose what was kept, so that the figures flatter a little. Judge the classifier by texts that it
  has not seen: `rnnopt evaluate`.
- {_scope(report)}
- Texts are cut off after the encoder's number of tokens. Languages and fields that the encoder has
  not read are separated less well, and the classifier inherits the encoder's biases.
"""


def _scope(report: Report) -> str:
    if report.micro_f1 is not None:
        return (
            "A text gets every label above whose probability reaches the label's threshold, and "
            "none if there is\n  no such label. Labels that it was not fitted on it does not know."
        )
    if report.answered is not None:
        return (
            "A text that resembles none of the labels gets no answer. Of the texts held out, which "
            f"all belong\n  to one, {1 - report.answered:.3f} got none. Texts of other kinds that "
            "resemble a label are answered\n  all the same."
        )
    return (
        "Every text gets one of the labels above, also a text that belongs to none. With `abstain` "
        "or `abstain_below`\n  doubtful answers are left out."
    )

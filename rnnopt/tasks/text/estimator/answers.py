"""How logits become answers: the likeliest label, labels above thresholds, or none at all.

Shapes: B texts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rnnopt.errors import InputError
from rnnopt.tasks.text.estimator.evidence import Judged
from rnnopt.tasks.text.estimator.inputs.labelled import Labels
from rnnopt.tasks.text.estimator.objective.choice import ONE_LABEL, SEVERAL_LABELS
from rnnopt.tasks.text.estimator.objective.protocol import Objective
from rnnopt.tasks.text.estimator.objective.several_labels import best_thresholds, middle_thresholds


@dataclass(frozen=True)
class Decision:
    """What is answered.

    Attributes:
        classes: the labels, (C,).
        thresholds: (C,), probabilities from which on a text has a label; None where it has exactly
            one, the likeliest.
        floor: a text whose largest logit is below it has no answer; None for no such bound. The
            largest logit tells texts of other classes better than the largest probability does
            (Vaze et al. 2022, arXiv:2110.06207), since softmax keeps differences alone.
    """

    classes: np.ndarray
    thresholds: np.ndarray | None = None
    floor: float | None = None

    @property
    def objective(self) -> Objective:
        """One label a text, or several."""
        return ONE_LABEL if self.thresholds is None else SEVERAL_LABELS

    def answers(self, logits: np.ndarray, least: float | None = None) -> Any:
        """The answers to logits (B, C).

        Args:
            logits: at the temperature.
            least: the smallest probability of an answer; None for no such bound.

        Returns:
            An array of labels (B,), with None where there is no answer; where a text may have
            several labels, a list of B lists.
        """
        if self.thresholds is not None:
            yes = self.objective.probabilities(logits) >= self.thresholds
            return [self.classes[row].tolist() for row in yes]
        found = self.classes[logits.argmax(axis=1)]
        if self.floor is None and least is None:
            return found
        silent = np.zeros(len(logits), bool)
        if self.floor is not None:
            silent |= logits.max(axis=1) < self.floor
        if least is not None:
            silent |= self.objective.probabilities(logits).max(axis=1) < least
        found = found.astype(object)
        found[silent] = None
        return found


def choose_decision(
    labels: Labels, judged: Judged | None, logits: np.ndarray, abstain: float | None
) -> Decision:
    """Thresholds or a floor, by the texts held out.

    Args:
        labels: that the classifier was fitted on.
        judged: what classifies, on texts held out; None where there are none.
        logits: of the texts that it was fitted on, (B, C); they serve where none was held out.
        abstain: see `floor_of`; None always answers.

    Raises:
        InputError: as `floor_of`.
    """
    if abstain is not None:
        return Decision(labels.classes, floor=floor_of(judged, abstain))
    if not labels.several:
        return Decision(labels.classes)
    if judged is None:
        chances = SEVERAL_LABELS.probabilities(logits)
        return Decision(labels.classes, middle_thresholds(chances, labels.places))
    chances = SEVERAL_LABELS.probabilities(judged.logits)
    return Decision(labels.classes, best_thresholds(chances, judged.labels))


def floor_of(judged: Judged | None, share: float) -> float:
    """The largest logit below which at most a share of the texts held out falls.

    Args:
        judged: what classifies, on texts held out.
        share: of texts of the known classes that may stay without an answer.

    Raises:
        InputError: no text could be held out.
    """
    if judged is None:
        raise InputError(
            f"abstain is {share}, and every label has one text, so that none can be held out to "
            "choose by; give labels two texts or more, or a probability as abstain_below"
        )
    confidences = np.sort(judged.logits.max(axis=1))
    return float(confidences[int(share * len(confidences))])

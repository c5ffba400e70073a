"""How long `rnnopt fit` is going to adapt, by a timed step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rnnopt.tasks.text.encoder.sentence import SentenceEncoder
from rnnopt.tasks.text.estimator.adaptation import ADAPTATION_FOLDS, JUDGED, affordable, seconds_of
from rnnopt.tasks.text.estimator.evidence import Labelled
from rnnopt.tasks.text.estimator.objective.choice import objective_of
from rnnopt.tasks.text.estimator.steps import Adaptation, Plan


@dataclass(frozen=True)
class Forecast:
    """What `adapt_if_better` is going to do.

    Attributes:
        folds: of cross-validation; 0 where nothing is going to be adapted.
        steps: optimizer steps at most.
        step: seconds of one step, in a fold.
        seconds: of adaptation, cross-validation included.
    """

    folds: int
    steps: int
    step: float
    seconds: float


def forecast(
    encoder: SentenceEncoder, texts: Sequence[str], labels: np.ndarray, plan: Plan, forward: float
) -> Forecast:
    """Time a step, and say how long adaptation is going to take; the encoder stays as it is.

    Args:
        encoder: that would be adapted.
        texts: B texts.
        labels: of them.
        plan: how it would be done.
        forward: seconds of the encoder for a text, without a gradient.

    Raises:
        InputError: this encoder can't be adapted.
    """
    objective = objective_of(labels)
    nothing = Labelled(np.zeros((len(texts), 0)), labels, np.ones(len(texts)))
    adaptation = Adaptation(encoder, texts, nothing, plan)
    try:
        step = adaptation.seconds_per_step()
    finally:
        adaptation.end(keep=False)
    most = len(objective.folds(labels, ADAPTATION_FOLDS, plan.seed))
    folds, steps = affordable(most, plan, step) if plan.steps else (0, 0)
    judged = len({*JUDGED, steps} & {*range(1, steps + 1)})
    seconds = seconds_of(folds, steps, step) + judged * len(texts) * forward if folds else 0.0
    return Forecast(folds, steps, step, seconds)

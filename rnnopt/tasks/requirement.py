"""Requirements on the metrics of a run, such as ``accuracy@5>=0.85 and loss<1``.

The grammar, in which white space is ignored::

    requirement = condition { ("and" | ",") condition }
    condition   = metric ["@" budget] operator number
    operator    = ">=" | ">" | "<=" | "<"
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rnnopt.errors import InputError

NOT_MET = 3  # the exit code of a command whose requirement was not met
# Digits to which a figure is rounded before it is compared and written. The mean of tasks may be
# 0.8499999999999999 instead of 0.85, and a run and its report must come to the same decision.
DIGITS = 5
_BOUNDS = {name: (0.0, 1.0) for name in ("accuracy", "precision", "recall", "f1")}
_BOUNDS["loss"] = (0.0, math.inf)
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_CONDITION = re.compile(
    r"\s*(?P<metric>[a-z]\w*)\s*(@\s*(?P<budget>-?\d+)\s*)?(?P<operator>[<>]=?)"
    r"\s*(?P<threshold>[^\s<>=@]+)\s*",
    re.IGNORECASE | re.ASCII,
)
_AND = re.compile(r",|\band\b", re.IGNORECASE)

# metric -> its values after each adaptation step, or a single value; None if it is not finite
Figures = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Condition:
    """One comparison of a metric with a threshold.

    Attributes:
        metric: the name of the metric, a key of the figures.
        budget: the number of adaptation steps after which the metric is taken, from 1; None takes
            the last.
        operator: ``>=``, ``>``, ``<=`` or ``<``.
        threshold: a share from 0 to 1, or nats per text for the loss.
    """

    metric: str
    budget: int | None
    operator: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.threshold!r}"

    @property
    def name(self) -> str:
        """The name of the metric, with its budget if there is one."""
        return self.metric if self.budget is None else f"{self.metric}@{self.budget}"

    def margin(self, figures: Figures) -> float:
        """The distance of the figure from the threshold, negative if the condition fails.

        It is -inf if the figure is not finite.
        """
        value = self._value(figures)
        if value is None or math.isnan(value):
            return -math.inf
        return value - self.threshold if self.operator[0] == ">" else self.threshold - value

    def met(self, figures: Figures) -> bool:
        """Whether the figure meets the condition. A figure that is not finite never does."""
        value = self._value(figures)
        return value is not None and _OPERATORS[self.operator](value, self.threshold)

    def words(self, figures: Figures) -> str:
        """The figure and the condition, as text."""
        value = self._value(figures)
        shown = "not finite" if value is None else f"{value:g}"
        return f"{self.name} {shown} (needs {self.operator} {self.threshold:g})"

    def _value(self, figures: Figures) -> float | None:
        value = figures[self.metric][-1 if self.budget is None else self.budget - 1]
        return None if value is None else round(value, DIGITS)


@dataclass(frozen=True)
class Requirement:
    """Conditions that must all hold. `Requirement.parse` makes it; ``str`` gives its text back."""

    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: str, metrics: Sequence[str], horizon: int | None = None) -> Requirement:
        """Parse the text of a requirement.

        Args:
            text: the text, in the grammar at the top of this module.
            metrics: the available metrics, among accuracy, precision, recall, f1 and loss.
            horizon: the number of adaptation steps, which is the largest budget. None means that
                there are no budgets.

        Raises:
            InputError: the text does not follow the grammar, names an unknown metric or budget, or
                can never be met.
        """
        example = "accuracy@5>=0.85 and loss<1" if horizon is not None else "accuracy>=0.9, f1>0.8"
        if horizon is not None and horizon < 5:
            example = example.replace("@5", f"@{horizon}")
        parts = [_condition(part, text, metrics, horizon, example) for part in _AND.split(text)]
        return cls(tuple(parts))

    def __str__(self) -> str:
        return " and ".join(map(str, self.conditions))

    def met(self, figures: Figures) -> bool:
        """Whether every condition holds."""
        return all(condition.met(figures) for condition in self.conditions)

    def words(self, figures: Figures) -> str:
        """Every figure and its condition, and whether all conditions are met, as text."""
        text = "; ".join(condition.words(figures) for condition in self.conditions)
        return f"{text}: {'met' if self.met(figures) else 'not met'}"

    def rank(self, figures: Figures) -> tuple[int, float]:
        """A key that sorts figures by how close they are to meeting the requirement.

        It is the number of conditions that are met, then the margin of the first condition.
        """
        met = sum(condition.met(figures) for condition in self.conditions)
        return met, self.conditions[0].margin(figures)


def _condition(
    part: str, text: str, metrics: Sequence[str], horizon: int | None, example: str
) -> Condition:
    where = f"requirement {text!r}"
    found = _CONDITION.fullmatch(part)
    threshold = _number(found["threshold"]) if found else None
    if found is None or threshold is None:
        at = "[@BUDGET]" if horizon is not None else ""
        raise InputError(
            f"{where}: can't read {part.strip()!r}; write METRIC{at} OPERATOR NUMBER with one "
            f"of {', '.join(_OPERATORS)}, several joined by `and` or a comma, such as {example!r}"
        )
    metric = found["metric"].lower()
    if metric not in metrics:
        raise InputError(
            f"{where}: there is no metric {metric!r}; choose from {', '.join(metrics)}, such "
            f"as {example!r}"
        )
    budget = int(found["budget"]) if found["budget"] else None
    if budget is not None:
        _check_budget(budget, where, horizon, example)
    low, high = _BOUNDS[metric]
    if not low <= threshold <= high or math.isinf(threshold):
        span = f"lie between {low:g} and {high:g}"
        if math.isinf(high):
            span = f"be finite and at least {low:g}"
        raise InputError(
            f"{where}: {metric} is compared with {threshold:g}, which must {span}, such as "
            f"{example!r}"
        )
    if (found["operator"], threshold) in ((">", high), ("<", low)):
        raise InputError(
            f"{where}: {metric} lies between {low:g} and {high:g} and is never "
            f"{found['operator']} {threshold:g}; use {found['operator']}= or another number, such "
            f"as {example!r}"
        )
    return Condition(metric, budget, found["operator"], threshold)


def _check_budget(budget: int, where: str, horizon: int | None, example: str) -> None:
    if horizon is None:
        raise InputError(
            f"{where}: budget @{budget}: this command checks the newest step only; leave the "
            f"budget out, such as {example!r}, and limit the steps with --steps"
        )
    if not 1 <= budget <= horizon:
        raise InputError(
            f"{where}: budget @{budget} must lie between 1 and {horizon}, the steps of adaptation "
            f"(--steps), such as {example!r}"
        )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number

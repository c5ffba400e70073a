"""The cells of `benchmark_quality.py` as Markdown: figures, and the targets that they are held to.

The targets are those of a rule that has nothing set, on the same episodes as every baseline:

1. Steps. At 3 steps at least the best accuracy of tuned AdamW at any budget; at 1 step at least
   AdamW's at 5; at 10 steps two points above AdamW's best; query loss at 5 steps below its best.
2. Against what needs no tuning either: ahead of each at every budget up to 20.
3. Never a bad surprise: ahead of the best baseline at the same budget, or level with it (the 95 %
   interval of the paired difference reaches 0), in 95 % of all cells and budgets, and in none more
   than one point behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rnnopt.evaluation.comparison import LEARNED
from rnnopt.evaluation.statistics import interval

Result = Mapping[str, Any]  # what `rnnopt compare` writes

SHOWN = (1, 3, 5, 10, 20, 40)
LOSS_AT = 5
UNTUNED = ("adamw-default", "muon-default", "prodigy", "schedulefree", "dadapt")
LAST = 20  # budget up to which targets 2 and 3 hold
SURPRISE = 0.01
LEVEL_SHARE = 0.95
# The short table: what stands in it, and how names are spelled there.
SHORT = (1, 2, 3, 5, 10, 20)
SHORT_LOSS = (1, 5)
SHORT_METHODS = (LEARNED, "adamw", "sgd", "schedulefree")
TRAINS = {"head": "head alone", "lora": "LoRA rank 8 + head", "full": "all weights"}
BEGIN, END = "<!-- short_table of quality_table.py -->", "<!-- end of it -->"
SPELLED = {
    LEARNED: "**rnnopt**",
    "adamw": "AdamW, tuned",
    "sgd": "SGD, tuned",
    "muon": "Muon, tuned",
    "schedulefree": "Schedule-Free AdamW",
}


@dataclass(frozen=True)
class Gap:
    """A paired difference and whether it is what was wanted.

    Attributes:
        mean, ci95: in favour of the rule where positive.
        wanted: the least mean that meets the target.
        strict: the mean must be above `wanted`.
    """

    mean: float
    ci95: float
    wanted: float = 0.0
    strict: bool = False

    @property
    def met(self) -> bool:
        return self.mean > self.wanted if self.strict else self.mean >= self.wanted

    def __str__(self) -> str:
        verdict = "met" if self.met else f"**missed by {self.wanted - self.mean:.3f}**"
        return f"{self.mean:+.3f} ± {self.ci95:.3f}, {verdict}"


def quality_table(results: Mapping[str, Result]) -> str:
    """All of it.

    Args:
        results: by the cell's name.
    """
    results = dict(sorted(results.items()))
    return "\n\n".join(part(results) for part in (_figures, _steps, _untuned, _surprises))


def short_table(results: Mapping[str, Result], titles: Mapping[str, str]) -> str:
    """A few methods in a few cells, with what the rule is ahead of tuned AdamW by.

    Args:
        results: by the cell's name.
        titles: how each cell is called, in the order of the table.
    """
    columns = [*(str(b) for b in SHORT), *(f"loss at {b}" for b in SHORT_LOSS)]
    lines = ["| | method | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name, title in titles.items():
        result = results[name]
        for method in SHORT_METHODS:
            if method in result["methods"]:
                spelled = SPELLED[method] + (", nothing set" if method == LEARNED else "")
                row = _short_row(result["methods"][method])
                lines.append(f"| {title} | {spelled} | {row} |")
                title = ""
        if "adamw" in result["paired"]:
            row = _short_row(result["paired"]["adamw"], sign="+")
            lines.append(f"| | *rnnopt - AdamW, paired* | {row} |")
    return "\n".join(lines)


def _short_row(entry: Mapping[str, Any], sign: str = "") -> str:
    cells = [entry["accuracy"].get(str(b)) for b in SHORT]
    cells += [entry["loss"].get(str(b)) for b in SHORT_LOSS]
    return " | ".join(_figure(cell, sign) for cell in cells)


def filled(text: str, table: str) -> str:
    """A document with the table between its `BEGIN` and `END`.

    Raises:
        ValueError: it has not one of each, in this order.
    """
    before, found, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise ValueError(
            f"the file to fill has no place for the table: it goes between {BEGIN} and {END}"
        )
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _figures(results: Mapping[str, Result]) -> str:
    lines = [
        "| cell | method | "
        + " | ".join(f"{b}" for b in SHOWN)
        + f" | loss at {LOSS_AT} |\n|---|---|"
        + "---|" * (len(SHOWN) + 1)
    ]
    for name, result in results.items():
        title = _title(name, result)
        for method, entry in result["methods"].items():
            figures = [_figure(entry["accuracy"].get(str(b))) for b in SHOWN]
            if "frozen" in entry:  # one figure, without steps
                figures = [figures[0], *[""] * (len(figures) - 1)]
            loss = _figure(entry["loss"].get(str(LOSS_AT)))
            cells = [title, SPELLED.get(method, method), *figures, loss]
            lines.append("| " + " | ".join(cells) + " |")
            title = ""
    return (
        "Accuracy on query texts of unseen classes after so many steps, and query loss (nats), "
        "with 95 % intervals; nearest-mean and logistic take no steps.\n\n" + "\n".join(lines)
    )


def _title(name: str, result: Result) -> str:
    setting, notes = result["setting"], []
    used = setting.get("ways_used", {"report": setting["ways"], "tuning": setting["ways"]})
    for part, words in (("report", "ways, all it has"), ("tuning", "ways to tune by")):
        if used[part] < setting["ways"]:
            notes.append(f"{used[part]} {words}")
    if setting["seen_classes"]:
        notes.append(f"{len(setting['seen_classes'])} classes seen in meta-training")
    notes.append(f"{result['episodes']} episodes")
    return f"{name} ({'; '.join(notes)})"


def _figure(cell: Mapping[str, float] | None, sign: str = "") -> str:
    return f"{cell['mean']:{sign}.3f} ± {cell['ci95']:.3f}" if cell else ""


def _steps(results: Mapping[str, Result]) -> str:
    """Target 1."""
    lines = [
        "| target 1: steps | 3 against AdamW's best | 1 against AdamW's 5 | 10 against its best "
        "+ 0.02 | loss at 5 against AdamW's best |\n|---|---|---|---|---|"
    ]
    for name, result in results.items():
        if "adamw" not in result["methods"]:
            continue
        best = _best_budget(result, "adamw", "accuracy")
        least = _best_budget(result, "adamw", "loss")
        gaps = [
            _gap(result, "accuracy", 3, "adamw", best),
            _gap(result, "accuracy", 1, "adamw", 5),
            _gap(result, "accuracy", 10, "adamw", best, wanted=0.02),
            _gap(result, "loss", LOSS_AT, "adamw", least, strict=True),
        ]
        lines.append(f"| {name} | " + " | ".join(map(str, gaps)) + " |")
    return "\n".join(lines)


def _untuned(results: Mapping[str, Result]) -> str:
    """Target 2: the worst budget against each."""
    lines = [
        f"| target 2: worst of budgets to {LAST} | " + " | ".join(UNTUNED) + " |",
        "|---|" + "---|" * len(UNTUNED),
    ]
    for name, result in results.items():
        cells = []
        for method in UNTUNED:
            gaps = {
                b: _gap(result, "accuracy", b, method, b, strict=True)
                for b in _budgets(result, method)
            }
            worst = min(gaps, key=lambda b: gaps[b].mean, default=None)
            cells.append("" if worst is None else f"at {worst}: {gaps[worst]}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _surprises(results: Mapping[str, Result]) -> str:
    """Target 3."""
    gaps = {
        (name, b, method): gap
        for name, result in results.items()
        for b, method, gap in _against_best(result)
    }
    if not gaps:
        return "Target 3: no baseline takes steps in these cells."
    level = [gap.mean + gap.ci95 >= 0 for gap in gaps.values()]
    share = sum(level) / len(level)
    (name, budget, method), worst = min(gaps.items(), key=lambda pair: pair[1].mean)
    verdict = "met" if share >= LEVEL_SHARE else f"**missed by {LEVEL_SHARE - share:.1%}**"
    return (
        f"Target 3: ahead of the best baseline at the same budget, or level, in {share:.1%} "
        f"of {len(level)} cells and budgets (at least {LEVEL_SHARE:.0%}): {verdict}. Farthest "
        f"behind, at most {SURPRISE} allowed: {name}, {budget} steps, {method}: {worst}."
    )


def _against_best(result: Result) -> Iterator[tuple[int, str, Gap]]:
    """For each budget the baseline with the best mean, and the rule's lead over it."""
    rivals = [
        method
        for method, entry in result["methods"].items()
        if method != LEARNED and "frozen" not in entry
    ]
    for budget in sorted({b for method in rivals for b in _budgets(result, method)}):
        means = {
            method: result["methods"][method]["accuracy"][str(budget)]["mean"]
            for method in rivals
            if budget in _budgets(result, method)
        }
        best = max(means, key=means.__getitem__)
        yield budget, best, _gap(result, "accuracy", budget, best, budget, wanted=-SURPRISE)


def _budgets(result: Result, method: str) -> list[int]:
    """At which the rule and a method can be compared."""
    found = result["values"].get(method, {"accuracy": {}})["accuracy"]
    return [int(b) for b in result["values"][LEARNED]["accuracy"] if b in found and int(b) <= LAST]


def _best_budget(result: Result, method: str, metric: str) -> int:
    cells = result["methods"][method][metric]
    sign = 1 if metric == "accuracy" else -1
    return int(max(cells, key=lambda b: sign * cells[b]["mean"]))


def _gap(result: Result, metric: str, ours: int, method: str, theirs: int, **target: Any) -> Gap:
    """The rule at one budget against a method at another, on the same episodes."""
    values = result["values"]
    difference = np.subtract(
        values[LEARNED][metric][str(ours)], values[method][metric][str(theirs)]
    )
    return Gap(**interval(difference if metric == "accuracy" else -difference), **target)

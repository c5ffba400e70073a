"""Log records for TensorBoard, or whatever else has its `add_scalar`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from rnnopt.errors import InputError

_STEPS = ("meta_step", "step")  # what may count the records


class ScalarWriter(Protocol):
    """What `torch.utils.tensorboard.SummaryWriter` and its like have."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Keep a value under a name, at a step."""
        ...


def to_writer(writer: ScalarWriter, prefix: str = "") -> Callable[[Mapping[str, Any]], None]:
    """A `report` for `rnnopt.meta_train` and `TextClassifier.fit` that draws curves.

    >>> rnnopt.meta_train(learner, tasks, report=rnnopt.to_writer(SummaryWriter("runs/mine")))

    A record's numbers are written at its ``meta_step`` or ``step``, those within a dictionary as
    ``name/part``, those of a list as ``name/1`` and so on. What is no number is left out.

    Args:
        writer: has ``add_scalar(tag, value, step)``.
        prefix: stands before every name.

    Raises:
        InputError: the writer has no such method.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise InputError(
            f"writer is a {type(writer).__name__}, which has no method add_scalar; give a "
            "torch.utils.tensorboard.SummaryWriter, or something like it"
        )

    def report(record: Mapping[str, Any]) -> None:
        step = next((record[name] for name in _STEPS if name in record), 0)
        for tag, value in _numbers(prefix, record):
            if tag.removeprefix(prefix) not in _STEPS:
                writer.add_scalar(tag, value, step)

    return report


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    """(name, number) of every number in a value."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(f"{tag}/{name}" if tag and tag[-1] != "/" else f"{tag}{name}", part)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value, start=1):
            yield from _numbers(f"{tag}/{number}", part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield tag, float(value)

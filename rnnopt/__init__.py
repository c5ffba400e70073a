"""rnnopt: a learned optimizer that adapts models to new tasks in a handful of steps.

>>> from rnnopt import LearnedOptimizer
>>> optimizer = LearnedOptimizer(model.parameters())  # instead of AdamW(..., lr=...)

Importing this module loads torch and nothing heavier. `meta_train` and `compare` are loaded when
they are first used.
"""

from __future__ import annotations

from typing import Any

from rnnopt.errors import InputError
from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.classical import SGD, Adam, AdamW
from rnnopt.rules.files import load_rule, save_rule
from rnnopt.rules.lstm import CoordinateLSTM
from rnnopt.rules.meta_sgd import MetaSGD
from rnnopt.rules.protocol import State, UpdateRule
from rnnopt.tasks.protocol import Learner, Metric, Task, TaskSource

__version__ = "0.1.0"

# Names that are loaded when they are first used: where they are defined.
_LATER = {
    "compare": "rnnopt.evaluation.compare",
    "meta_train": "rnnopt.meta.meta_train",
}

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CoordinateLSTM",
    "InputError",
    "LearnedOptimizer",
    "Learner",
    "MetaSGD",
    "Metric",
    "State",
    "Task",
    "TaskSource",
    "UpdateRule",
    "compare",
    "load_rule",
    "meta_train",
    "save_rule",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)

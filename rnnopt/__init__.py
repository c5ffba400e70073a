"""rnnopt: a learned optimizer that adapts models to new tasks in a handful of steps.

>>> from rnnopt import LearnedOptimizer
>>> optimizer = LearnedOptimizer(model.parameters())  # instead of AdamW(..., lr=...)

Every name is loaded when it is first used: `LearnedOptimizer` loads torch and nothing heavier,
`meta_train` and `compare` load what they need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rnnopt.storage.version import __version__

if TYPE_CHECKING:
    from rnnopt.errors import InputError
    from rnnopt.evaluation.compare import compare
    from rnnopt.meta.meta_train import meta_train
    from rnnopt.optim.optimizer import LearnedOptimizer
    from rnnopt.optim.trainer import trainer_settings
    from rnnopt.rules.classical import SGD, Adam, AdamW
    from rnnopt.rules.files import load_rule, save_rule
    from rnnopt.rules.meta_sgd import MetaSGD
    from rnnopt.rules.protocol import State, UpdateRule
    from rnnopt.rules.two_level import TwoLevelLSTM
    from rnnopt.storage.scalars import to_writer
    from rnnopt.tasks.protocol import Learner, Metric, Task, TaskSource
    from rnnopt.tasks.text.estimator.text_classifier import TextClassifier


__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "InputError",
    "LearnedOptimizer",
    "Learner",
    "MetaSGD",
    "Metric",
    "State",
    "Task",
    "TaskSource",
    "TextClassifier",
    "TwoLevelLSTM",
    "UpdateRule",
    "__version__",
    "compare",
    "load_rule",
    "meta_train",
    "save_rule",
    "to_writer",
    "trainer_settings",
]

_HOMES = {
    "rnnopt.errors": ("InputError",),
    "rnnopt.evaluation.compare": ("compare",),
    "rnnopt.meta.meta_train": ("meta_train",),
    "rnnopt.optim.optimizer": ("LearnedOptimizer",),
    "rnnopt.optim.trainer": ("trainer_settings",),
    "rnnopt.rules.classical": ("SGD", "Adam", "AdamW"),
    "rnnopt.rules.files": ("load_rule", "save_rule"),
    "rnnopt.rules.meta_sgd": ("MetaSGD",),
    "rnnopt.rules.protocol": ("State", "UpdateRule"),
    "rnnopt.rules.two_level": ("TwoLevelLSTM",),
    "rnnopt.storage.scalars": ("to_writer",),
    "rnnopt.tasks.protocol": ("Learner", "Metric", "Task", "TaskSource"),
    "rnnopt.tasks.text.estimator.text_classifier": ("TextClassifier",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

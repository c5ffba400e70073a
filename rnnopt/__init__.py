"""rnnopt: a learned optimizer that adapts text classifiers to new tasks in a handful of steps.

>>> from rnnopt import LearnedOptimizer
>>> optimizer = LearnedOptimizer(model.parameters())  # instead of AdamW(..., lr=...)

Importing this module loads torch and nothing heavier; `rnnopt.differentiable` registers the
optimizer with `higher`, `rnnopt.text` loads `transformers`.
"""

from rnnopt.baselines import SGD, Adam, AdamW
from rnnopt.checkpoint import load_rule, save_rule
from rnnopt.errors import InputError
from rnnopt.lstm import CoordinateLSTM
from rnnopt.metasgd import MetaSGD
from rnnopt.optimizer import LearnedOptimizer
from rnnopt.rule import State, UpdateRule

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CoordinateLSTM",
    "InputError",
    "LearnedOptimizer",
    "MetaSGD",
    "State",
    "UpdateRule",
    "load_rule",
    "save_rule",
]

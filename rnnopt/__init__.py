"""rnnopt: a learned optimizer that adapts text classifiers to new tasks in a handful of steps.

>>> from rnnopt import LearnedOptimizer
>>> optimizer = LearnedOptimizer(model.parameters())  # instead of AdamW(..., lr=...)

Importing this module loads torch and nothing heavier. `rnnopt.meta.differentiable` registers the
optimizer with `higher`; `rnnopt.tasks.text.classifier` loads `transformers`.

Subpackages, each of which imports only those before it:

- `rnnopt.rules`: update rules, their features and their files.
- `rnnopt.optim`: rules as a `torch.optim.Optimizer`, with a guard, sharding and fused kernels.
- `rnnopt.data`: labelled texts from files, and their splits.
- `rnnopt.tasks`: episodes and few-shot tasks; `rnnopt.tasks.text` classifies texts.
- `rnnopt.meta`: meta-training of rules and of initial values.
- `rnnopt.evaluation`: comparison with other optimizers, and reports.
- `rnnopt.cli`: the command `rnnopt`.
"""

from rnnopt.errors import InputError
from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.classical import SGD, Adam, AdamW
from rnnopt.rules.files import load_rule, save_rule
from rnnopt.rules.lstm import CoordinateLSTM
from rnnopt.rules.meta_sgd import MetaSGD
from rnnopt.rules.protocol import State, UpdateRule

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

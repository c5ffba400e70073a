"""The optimizers that a rule is compared with, used as their authors recommend.

Some are tuned: the comparison chooses their learning rate on validation tasks. The others claim to
need no tuning and run with their documented settings.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.rules.files import rule_name
from rnnopt.rules.protocol import UpdateRule
from rnnopt.tasks.kinds import tensor_kinds
from rnnopt.tasks.protocol import Learner
from rnnopt.tasks.start import Start, rule_optimizer

# (learner at its starting values, parameters to step by name, learning rate, number of steps)
# -> optimizer
Params = Mapping[str, nn.Parameter]
Build = Callable[[Learner, Params, float, int], torch.optim.Optimizer]


@dataclass(frozen=True)
class Baseline:
    """An optimizer to compare with.

    Attributes:
        build: makes the optimizer, see `Build`.
        grid: the learning rates to choose from, from the smallest to the largest. An optimizer with
            a single one is not tuned.
        package: the package that it needs beside torch.
        scheduled: whether its learning rate depends on the number of steps of a run. Every budget
            then needs a run of its own.
        start: where it starts on a task, such as initial values that MAML learned. None: where
            every method starts. The same parameters are stepped in either case.
        version: distinguishes it from others of its name in a journal, such as a fingerprint of
            the weights of a rule.
    """

    build: Build
    grid: tuple[float, ...]
    package: str | None = None
    scheduled: bool = False
    start: Start | None = None
    version: str = ""

    @property
    def tuned(self) -> bool:
        """Whether the comparison chooses its learning rate."""
        return len(self.grid) > 1


def rule_baseline(rule: UpdateRule, start: Start | None = None) -> Baseline:
    """Another rule as a row of a comparison: with nothing to tune, like the rule that is compared.

    Args:
        rule: the rule.
        start: see `Baseline`.
    """

    def build(learner: Learner, params: Params, lr: float, steps: int) -> torch.optim.Optimizer:
        return rule_optimizer(params, rule, lr)

    return Baseline(build, (1.0,), start=start, version=rule_name(rule))


class Together(torch.optim.Optimizer):
    """Several optimizers of different parameters that step together."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__(
            [p for part in parts for group in part.param_groups for p in group["params"]], {}
        )

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with each optimizer."""
        for part in self.parts:
            part.step()


def _adamw(learner: Learner, params: Params, lr: float, steps: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params.values(), lr=lr)


def _sgd(learner: Learner, params: Params, lr: float, steps: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(params.values(), lr=lr, momentum=0.9)


def _adamw_default(
    learner: Learner, params: Params, lr: float, steps: int
) -> torch.optim.Optimizer:
    """The defaults of `transformers.Trainer`: linear decay to 0 and no warm-up."""
    optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps
    )
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def _muon(learner: Learner, params: Params, lr: float, steps: int) -> torch.optim.Optimizer:
    """Muon with updates of AdamW's size, so that both can have the same learning rate.

    Liu et al. 2025, arXiv:2502.16982, section 2.2.
    """
    return _muon_and_adamw(
        learner, params, {"lr": lr, "weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}, lr
    )


def _muon_default(learner: Learner, params: Params, lr: float, steps: int) -> torch.optim.Optimizer:
    """The example in the documentation of `torch.optim.Muon`."""
    return _muon_and_adamw(learner, params, {"lr": lr, "momentum": 0.95}, 3e-4)


def _muon_and_adamw(
    learner: Learner, params: Params, options: dict[str, Any], adamw_lr: float
) -> torch.optim.Optimizer:
    """Muon for matrices, AdamW for embeddings and all else, as torch's documentation advises."""
    kinds = tensor_kinds(learner)
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, param in params.items():
        matrix = param.dim() == 2 and kinds[name] != "embedding"
        (matrices if matrix else rest).append(param)
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, **options))
    if rest:
        parts.append(torch.optim.AdamW(rest, lr=adamw_lr, weight_decay=0.01))
    return Together(parts)


def _prodigy(learner: Learner, params: Params, lr: float, steps: int) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(params.values(), lr=lr)


def _schedule_free(
    learner: Learner, params: Params, lr: float, steps: int
) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params.values(), lr=lr)
    optimizer.train()
    return optimizer


def _d_adaptation(learner: Learner, params: Params, lr: float, steps: int) -> torch.optim.Optimizer:
    from dadaptation import DAdaptAdam

    return DAdaptAdam(params.values(), lr=lr)


# Half-decades that range from too small to too large in every setting: with AdamW, all weights of a
# pretrained encoder need about 3e-4 and a head alone about 1e-1.
ADAMW_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SGD_GRID = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)

BASELINES: Mapping[str, Baseline] = {
    "adamw": Baseline(_adamw, ADAMW_GRID),
    "sgd": Baseline(_sgd, SGD_GRID),
    "muon": Baseline(_muon, ADAMW_GRID),
    "muon-default": Baseline(_muon_default, (0.02,)),
    # the usual rate of BERT's fine-tuning, and the default of `transformers.TrainingArguments`
    "adamw-default": Baseline(_adamw_default, (5e-5,), scheduled=True),
    # Mishchenko & Defazio 2024, arXiv:2306.06101; "leave lr set to 1"
    "prodigy": Baseline(_prodigy, (1.0,), package="prodigyopt"),
    # Defazio et al. 2024, arXiv:2405.15682; the rate is the package's default
    "schedulefree": Baseline(_schedule_free, (2.5e-3,), package="schedulefree"),
    # Defazio & Mishchenko 2023, arXiv:2301.07733; "leave lr set to 1"
    "dadapt": Baseline(_d_adaptation, (1.0,), package="dadaptation"),
}


def require_baseline(name: str, others: Sequence[str] = ()) -> None:
    """Make sure that a baseline exists and that its package is installed.

    Args:
        name: the name of the baseline.
        others: the names of methods that are not optimizers, which the message lists as well.

    Raises:
        InputError: the baseline does not exist, or a package is not installed.
    """
    if name not in BASELINES:
        raise InputError(f"baseline {name!r}: choose from {', '.join([*BASELINES, *others])}")
    package = BASELINES[name].package
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(
            f"baseline {name!r} needs {package}, which is not installed: "
            'pip install "rnnopt[compare]"'
        )

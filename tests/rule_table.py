"""Rules, one of each kind, for tests that hold for all of them."""

from collections.abc import Callable
from typing import Any

import torch

from rnnopt import SGD, Adam, AdamW, MetaSGD, TwoLevelLSTM, UpdateRule


def random_lstm(dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> TwoLevelLSTM:
    """A rule without zero weights, so that each has an effect; rates stay near Adam's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rule = TwoLevelLSTM(**options)
        with torch.no_grad():
            for weight in rule.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    return rule.to(dtype)


RULES: dict[str, Callable[[], UpdateRule]] = {
    "sgd": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.1, momentum=0.9),
    "adam": lambda: Adam(0.01),
    "adamw": lambda: AdamW(0.01, weight_decay=0.1),
    "meta-sgd": lambda: MetaSGD(["weight", "bias"]),
    "lstm": random_lstm,
    "no-coordinate-lstm": lambda: random_lstm(coordinate_units=0),
}

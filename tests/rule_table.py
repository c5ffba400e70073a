"""Rules, one of each kind, for tests that hold for all of them."""

from collections.abc import Callable
from typing import Any

import torch

from rnnopt import SGD, Adam, AdamW, CoordinateLSTM, MetaSGD, UpdateRule
from rnnopt.rules.two_level import TwoLevelLSTM


def random_lstm(
    dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> CoordinateLSTM:
    """A rule without zero weights, so that each of them has an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rule = CoordinateLSTM(**options)
        with torch.no_grad():
            for name, weight in rule.named_parameters():
                # growth compounds, and so would rounding
                size = 0.03 if name.startswith("growth_") else 0.3
                weight.add_(size * torch.randn_like(weight))
    return rule.to(dtype)


def random_two_level(
    dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> TwoLevelLSTM:
    """As `random_lstm`, of two levels; growth and rates stay near what they were."""
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
    "no-lstm": lambda: random_lstm(hidden_size=0),
    "orthogonalized": lambda: random_lstm(hidden_size=2, orthogonalize=True, growth_threshold=0.5),
    "two-level": random_two_level,
}

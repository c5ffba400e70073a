"""Gradients of any kind: no update beyond the rule's bound, no memory that stays poisoned."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from material import Material
from torch import Tensor

STEPS = 6
_SHAPES = [(1,), (7,), (3, 5), (65, 70), (4, 2, 3), (200, 33), (2, 60_000), (1_000_003,)]
# once for each rule, in 5 GB: 1e8 coordinates
_HUGE = (10_000, 10_000)
_TYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule that ships.

    Attributes:
        make: loads it.
        bound: the largest RMS that a step of a tensor may have, from the RMS of the parameter
            before it, the tensor's coordinates and the model's.
    """

    make: Callable[[], Any]
    bound: Callable[[Any, float, int, int], float]


def part(material: Material, folder: Path, seed: int, small: bool) -> dict[str, Any]:
    """Step random tensors by random gradients, with the kernel and without.

    Returns:
        Of each rule: the cases, the steps, the largest step as a share of the rule's bound, and
        what went wrong.
    """
    figures = {}
    for name, rule in _rules().items():
        chance = random.Random(seed)
        largest, bad, count = 0.0, [], 6 if small else 151
        for case in range(count):
            share, wrong = _case(rule, chance, small, huge=case == 150)
            largest = max(largest, share)
            bad += [f"{case}: {wrong}"] if wrong else []
        figures[name] = {
            "cases": count, "steps": count * STEPS, "right": count - len(bad),
            "largest step, share of the bound": round(largest, 3), "bad": bad,
        }  # fmt: skip
    return figures


def gradient(kind: str, shape: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
    """A gradient of one kind, float32."""
    grad = torch.randn(shape, generator=generator).clamp(-5, 5)
    flat = grad.reshape(-1)
    some = torch.rand(flat.shape, generator=generator) < 0.3
    if kind == "zero":
        flat.zero_()
    elif kind in ("nan", "inf", "-inf"):
        flat[some] = float(kind)
    elif kind == "all nan":
        flat.fill_(math.nan)
    elif kind == "rows":
        grad[torch.rand(shape[0], generator=generator) < 0.8] = 0
    elif kind == "denormal":
        return grad * 1e-41
    elif kind == "flipped":
        grad.abs_().neg_()
    elif kind == "outlier":
        flat[0] = 1e6
    return grad * scale


KINDS = (
    "plain", "plain", "zero", "nan", "inf", "-inf", "all nan", "rows", "denormal", "flipped",
    "outlier",
)  # fmt: skip


def _case(rule: Rule, chance: random.Random, small: bool, huge: bool = False) -> tuple[float, str]:
    """(the largest step as a share of the bound, what went wrong)."""
    from rnnopt import LearnedOptimizer

    few = small or chance.random() < 0.95  # large tensors take most of the time
    shapes = chance.sample(_SHAPES[: -2 if few else None], chance.randint(1, 3))
    dtype = chance.choice(_TYPES)
    if huge:
        shapes, dtype = [_HUGE], torch.float32
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    sizes = [chance.choice([0.0, 1e-4, 0.05, 1.0, 30.0]) for _ in shapes]
    params = [
        (size * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
        for size, shape in zip(sizes, shapes)
    ]
    guard = chance.choice([None, None, False])
    optimizer = LearnedOptimizer(
        params, rule.make(), fused=None if huge else chance.choice([None, False]), guard=guard
    )
    total, largest, told = sum(param.numel() for param in params), 0.0, []
    start, other, jumped = chance.choice([0.0, 0.0, chance.uniform(-12, 12)]), 0.0, False
    for step in range(STEPS):
        # one jump in scale at a time: a second one is a new scale, and the first step sets it
        other = chance.uniform(-30, 30) if step and not other else 0.0
        other = chance.choice([0.0, 0.0, other]) if step < STEPS - 1 else 0.0
        scale = 10.0 ** (start + other)
        kind = chance.choice(KINDS) if 0 < step < STEPS - 1 else "plain"  # the last one recovers
        if kind == "outlier" and (other or jumped):
            kind = "plain"
        elif jumped:
            scale, other = 10.0**start, 0.0
        jumped = bool(other) or kind == "outlier"
        told.append(f"{kind} * {scale:.0e}")
        for param in params:
            param.grad = gradient(kind, tuple(param.shape), scale, generator).to(dtype)
        before, undone = [param.detach().float().clone() for param in params], optimizer.undone
        optimizer.step()
        where = f"{dtype}, shapes {shapes}, sizes {sizes}, {told}"
        for param, old in zip(params, before):
            move = param.detach().float() - old
            if not torch.isfinite(param).all():
                return math.inf, f"a parameter is not finite: {where}"
            if optimizer.undone > undone:
                continue  # the last step was taken back, which is as long as that was
            rms = float(old.double().square().mean().sqrt())
            length = float(move.double().square().mean().sqrt())
            most = rule.bound(optimizer.rule, rms, param.numel(), total)
            most += float(torch.finfo(dtype).eps) * rms  # rounding
            if length > most:
                return length / most, f"a step of RMS {length:.3g} beyond {most:.3g}: {where}"
            largest = max(largest, length / most)
        wrong = [
            name
            for state in optimizer.state.values()
            for name, leaf in state.items()
            if not torch.isfinite(leaf).all()
        ]
        if wrong:
            return largest, f"memory {sorted(set(wrong))} is not finite: {where}"
    # a small step may be less than half precision can tell, and without the guard jumps are kept
    if (
        guard is None
        and dtype == torch.float32
        and all(torch.equal(param.detach().float(), old) for param, old in zip(params, before))
    ):
        moved = [float(param.detach().abs().max()) for param in params]
        if not optimizer.param_groups[0]["skipped"] and not optimizer.undone:
            return largest, f"the last, plain step moves nothing ({moved}): {where}"
    return largest, ""


def _rules() -> dict[str, Rule]:
    from rnnopt import load_rule
    from rnnopt.rules.files import SHIPPED_RULE

    return {"shipped rule": Rule(lambda: load_rule(SHIPPED_RULE), _bound)}


# Adam's direction is at most (1 - beta1) / sqrt(1 - beta2) and its kin for moments of 6 steps:
# sqrt(number of steps) bounds it by the inequality of Cauchy and Schwarz.
_ADAM = 3.2


def _bound(rule: Any, rms: float, count: int, total: int) -> float:
    """Growth of at most e - 1, and base_rates times exp(4) times the directions' weights."""
    from rnnopt.rules.tensor_features import FIRST_DISTANCE

    reach = rule.output.bias.abs() + rule.output.weight.abs().sum(-1)
    rate, _, *directions = reach.tolist()
    adam, gradient_, orthogonal_adam, orthogonal_gradient, last, cell = directions
    length = (1 + adam) * _ADAM + gradient_ + last + cell
    length += 1.3 * (orthogonal_adam + orthogonal_gradient)
    # rates are those of the coordinates that ever had a gradient, of which there may be few
    rates = FIRST_DISTANCE * math.exp(4.0 * math.tanh(rate / 4.0))
    return float((math.e - 1) * rms + rates * length / math.sqrt(count))

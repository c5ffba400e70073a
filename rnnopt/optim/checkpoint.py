"""Load the state of a `LearnedOptimizer`: checked against its rule, in the saved dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rnnopt.optim.safeguard import LAST_STEP, init_guard_state
from rnnopt.rules.protocol import State


def saved_states(
    state_dict: Mapping[str, Any],
    groups: Sequence[dict[str, Any]],
    init_state: Callable[[Tensor], State],
) -> dict[Tensor, State]:
    """The state of each parameter that has one in a state_dict.

    torch casts floating-point state to the parameter's dtype, which would round the float32 state
    of a bfloat16 parameter: an exact resume needs the leaves as they were saved.

    Args:
        state_dict: of a `LearnedOptimizer`.
        groups: param groups of the optimizer that loads it.
        init_state: `LearnedOptimizer.init_state`, for the shapes that the rule expects.

    Returns:
        Copies of the saved leaves, on the parameters' devices.

    Raises:
        ValueError: a saved state is that of another rule or of another parameter.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    own = [param for group in groups for param in group["params"]]
    return {
        param: _matching(param, state_dict["state"][index], init_state)
        for index, param in zip(saved, own)
        if state_dict["state"].get(index)
    }


def check_groups(state_dict: Mapping[str, Any], expected: set[str]) -> None:
    """Check that every saved param group has these entries.

    Raises:
        ValueError: one has not; then it was saved by another optimizer.
    """
    for group in state_dict["param_groups"]:
        if missing := expected - group.keys():
            raise ValueError(
                f"a saved group has {sorted(group)} and no {sorted(missing)}: it is not of a "
                "LearnedOptimizer of this version; load the state of one"
            )


def _matching(param: Tensor, saved: State, init_state: Callable[[Tensor], State]) -> State:
    expected = _shapes(init_state(param))
    if LAST_STEP in saved:
        expected |= _shapes(init_guard_state(param))
    found = _shapes(saved)
    if expected != found:
        raise ValueError(
            f"the saved state of a parameter of shape {tuple(param.shape)} is {found}, but this "
            f"optimizer's rule keeps {expected}; load it with the rule that it was saved with"
        )
    return {name: leaf.to(param.device, copy=True) for name, leaf in saved.items()}


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in state.items()}

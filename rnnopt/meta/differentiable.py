"""`LearnedOptimizer` for `higher`: importing this module registers its differentiable version.

>>> import higher, rnnopt.meta.differentiable
>>> with higher.innerloop_ctx(model, LearnedOptimizer(model.parameters(), rule)) as (fmodel, opt):
...     opt.step(loss(fmodel))  # differentiable in the rule's weights
"""

from __future__ import annotations

import warnings
from abc import ABC, ABCMeta
from typing import Any

from torch import Tensor, nn

from rnnopt.optim.optimizer import LearnedOptimizer
from rnnopt.rules.protocol import advance, cross_tensor_context, statistics_of

__all__ = ["DifferentiableLearnedOptimizer", "higher"]

with warnings.catch_warnings():
    # Python warns when it compiles higher 0.2.1, which has "\ " in plain docstrings and an `is 1`.
    warnings.filterwarnings("ignore", message=".*invalid escape sequence")
    warnings.filterwarnings("ignore", message='"is" with')
    import higher


class DifferentiableLearnedOptimizer(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]
    """The same arithmetic as `LearnedOptimizer.step`, ``p' = p + delta``, with its graph kept.

    Attributes:
        rule: the rule of the given optimizer. It is the same object, so that its weights receive
            the meta-gradient.
        first_order: treat the rule's inputs (gradient, parameter) as constants, as Andrychowicz et
            al. 2016 do. Set it before the first step. The argument track_higher_grads=False of
            `higher` can't replace it, because it removes the meta-gradient altogether.
    """

    def __init__(self, other: LearnedOptimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(other, *args, **kwargs)
        self.rule = other.rule
        self._init_state = other.init_state
        self.first_order = False

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        work = []
        for group, states, grads in zip(self.param_groups, self.state, grouped_grads):
            for i, (param, grad) in enumerate(zip(group["params"], grads)):
                if grad is None:
                    continue
                seen, slope = (param.detach(), grad.detach()) if self.first_order else (param, grad)
                states[i] = states[i] or self._init_state(seen)
                work.append((group, states, i, seen, slope))
        sums = [
            statistics_of(self.rule, seen, slope, states[i]) for _, states, i, seen, slope in work
        ]
        before = [states[i] for _, states, i, _, _ in work]
        contexts = cross_tensor_context(self.rule, sums, before)
        for (group, states, i, seen, slope), context in zip(work, contexts):
            delta, states[i] = advance(
                self.rule, seen, slope, states[i], group["lr"], group["weight_decay"], context
            )
            param = group["params"][i]
            group["params"][i] = (param + delta).to(param.dtype)


class _PatchedType(ABCMeta):
    """The type of `higher`'s patched classes: `higher` alone makes instances of them.

    Containers make new ones of their own class: a slice of a `ModuleList` is
    ``self.__class__(modules)``, and Llama, Qwen2 and Mistral run through such a slice. `higher`'s
    classes take other arguments ("missing 1 required positional argument: 'root'"). A class that a
    module makes an instance of is therefore the original class, which holds the patched modules.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "root" in kwargs:  # `higher` itself, which names this argument
            return super().__call__(*args, **kwargs)
        original = cls.__bases__[0]
        # a ParameterList would turn the patched parameters into new ones, without their graph
        return (list if issubclass(original, nn.ParameterList) else original)(*args, **kwargs)


def _accept_all_modules() -> None:
    """Let `higher` patch peft's layers, and modules that slice a container.

    `higher` makes a class that inherits from the layer's class and from its own base class, whose
    bases are `(ABC, Module)`. peft's layers have the bases `(Module, ..., ABC)`. Python finds no
    order for both ("Cannot create a consistent method resolution order"). A base class with the
    bases `(Module, ABC)` works with every module.
    """
    base = higher.patch._MonkeyPatchBase
    own = {"__dict__", "__weakref__", "_abc_impl"}  # every class gets its own
    body = {name: value for name, value in vars(base).items() if name not in own}
    higher.patch._MonkeyPatchBase = _PatchedType(base.__name__, (nn.Module, ABC), body)


_accept_all_modules()
higher.register_optim(LearnedOptimizer, DifferentiableLearnedOptimizer)

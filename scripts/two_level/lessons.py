"""The tensor-wise LSTM learns to decide by itself what it decides with changes; no command.

See improve.py, which finds the changes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from changes import Changes, aimed_at, kind_of, missed
from drawing import Draw
from tasks import TaskBatch
from torch import Tensor
from train import MetaTraining
from unroll import TrainedRule, adapted

from rnnopt.rules.protocol import State

# Of the batches by which the rule is taught: as users have them; and of kinds with changes, each of
# which is as frequent as the others.
OF_USUAL, ASKED = 0.8, 0.6
META_LR, LAST_META_LR = 5e-3, 3e-4
MOST_STEPS = 16
COORDINATES = 0.1  # weight of what the coordinate-wise LSTM is told


class Pupil(NamedTuple):
    """A rule whose decisions are compared, and the outputs behind the latest ones."""

    rule: TrainedRule
    outputs: list[Tensor]

    @classmethod
    def of(cls, rule: TrainedRule) -> Pupil:
        """Keep what the rule's output layer gives."""
        outputs = list[Tensor]()
        rule.output.register_forward_hook(lambda _, __, output: outputs.append(output))
        return cls(rule, outputs)


def difference(pupil: Pupil, teacher: Pupil, tasks: TaskBatch, changes: Changes) -> Tensor:
    """How far a pupil's outputs are from its teacher's with the changes, along the pupil's run."""
    units, losses = pupil.rule.tensor_units, list[Tensor]()
    own: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    to_coordinates = teacher.rule.gates_context.weight

    def decide(step: int, statistics: Tensor, seen: State) -> Tensor:
        aim = teacher.rule.cross_tensor_context(statistics, {**seen, **other})
        context = pupil.rule.cross_tensor_context(statistics, {**seen, **own})
        for held, found in ((other, aim), (own, context)):
            held.update(hidden=found[..., -2 * units : -units], memory=found[..., -units:])
        target = aimed_at(teacher.outputs.pop(), changes.of(tasks, step), statistics)
        losses.append(missed(pupil.outputs.pop(), target, statistics))
        told = (own["hidden"] - other["hidden"]) @ to_coordinates.T
        losses.append(COORDINATES * told.square().mean())
        return context

    for _ in adapted(pupil.rule, tasks, decide):
        pass
    return torch.stack(losses).sum() / tasks.spec.steps


def teach(
    run: MetaTraining, teacher: TrainedRule, usual: Draw,
    kinds: Mapping[str, tuple[Changes | None, Draw]], updates: int,
) -> None:  # fmt: skip
    """Train the tensor-wise LSTM, in place.

    Args:
        run: whose rule is the pupil. Where nothing is asked, it is to decide as it does now.
        teacher: what decides, with changes, where they are asked.
        usual: draws tasks as users have them, for which changes hold.
        kinds: what to change in a kind of task, None for nothing, and what draws such tasks, each
            kind as often as the others. Those that are not here are drawn seldom, and nothing is
            asked of them.
        updates: of the weights, a batch each.
    """
    before = TrainedRule(**run.rule.config)
    before.load_state_dict(run.rule.state_dict())
    pupil = Pupil.of(run.rule)
    asking, keeping = (Pupil.of(rule.requires_grad_(False)) for rule in (teacher, before))
    trained = [p for n, p in run.rule.named_parameters()
               if n.split(".")[0] in ("tensor_cell", "message", "output")]  # fmt: skip
    optimizer = torch.optim.Adam(trained, META_LR)
    recent = list[float]()
    for number in range(updates):
        optimizer.param_groups[0]["lr"] = META_LR * (LAST_META_LR / META_LR) ** (number / updates)
        rng = random.Random(f"teach {number}")
        as_usual, with_changes = rng.random() < OF_USUAL, rng.random() < ASKED
        if kinds and with_changes:
            as_usual, draw_batch = True, kinds[rng.choice(sorted(kinds))][1]
        else:
            draw_batch = usual if as_usual else run.draw_batch
        drawn, make = draw_batch(rng, 1.0)
        tasks = make()
        tasks.spec = replace(drawn.spec, steps=min(drawn.spec.steps, MOST_STEPS))
        kind = kind_of(drawn)
        asked = kinds[kind][0] if as_usual and kind in kinds else None
        shown = keeping if asked is None else asking
        loss = difference(pupil, shown, tasks, asked or Changes())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        recent = [*recent[-49:], float(loss.detach())]
        if (number + 1) % 50 == 0:
            print(f"{number + 1} updates: difference {sum(recent) / len(recent):.4f}", flush=True)
    run.average = {name: param.detach().clone() for name, param in run.params.items()}

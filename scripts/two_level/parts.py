"""Parts of the rule that can be left out, by weights that are held at fixed values; no command.

`train.py --without` trains the rest of a rule on, and `evaluate.py --without` judges it as it is.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from rnnopt.rules.two_level import Decisions, TwoLevelLSTM

# what the output layer decides: the row of its weights that is 0
_OUTPUTS = {
    "coordinate-lstm": ("cell",),
    "orthogonal": ("orthogonal_adam", "orthogonal_gradient"),
    "gradient": ("gradient",),
    "last": ("last",),
    "growth": ("growth",),
}
PARTS = (*_OUTPUTS, "message", "memory")
# What meta-training goes on without. Second order is no part of the rule. With "nothing" only the
# averaged weights begin anew, as they do where something is left out: to compare with.
LEFT_OUT = (*PARTS, "second-order", "nothing")
FORGOTTEN = -30.0  # bias of a forget gate that is shut


@torch.no_grad()
def leave_out(rule: TwoLevelLSTM, parts: Collection[str]) -> None:
    """Set the weights of these parts so that they have no effect.

    - Of the output layer: the direction, or growth, has a share of 0. Without orthogonal directions
      matrices move as vectors do.
    - message: tensors see nothing of each other but the sums that base rates share.
    - memory: the tensor-wise LSTM sees neither its cell nor its output of the step before.

    Args:
        rule: is changed in place.
        parts: of `PARTS`; other names are passed over.
    """
    for part in parts:
        for name in _OUTPUTS.get(part, ()):
            row = Decisions._fields.index(name)
            rule.output.weight[row], rule.output.bias[row] = 0, 0
    if "message" in parts:
        rule.message.weight.zero_()
        rule.message.bias.zero_()
    if "memory" in parts:
        forget = slice(rule.tensor_units, 2 * rule.tensor_units)
        rule.tensor_cell.weight_hh.zero_()
        rule.tensor_cell.weight_ih[forget], rule.tensor_cell.bias_hh[forget] = 0, 0
        rule.tensor_cell.bias_ih[forget] = FORGOTTEN
        rule.message.weight[:, : rule.tensor_units] = 0
        if rule.coordinate_units:
            rule.gates_context.weight.zero_()

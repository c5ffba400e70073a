"""Low-rank factors (Hu et al. 2021, arXiv:2106.09685) put into an encoder by `peft`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from rnnopt.encoder import first_line
from rnnopt.errors import InputError

# Query and value projections, as peft's own defaults have them, of encoders that peft leaves out.
LORA_TARGETS = {
    "albert": ["query", "value"],
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "mpnet": ["attn.q", "attn.v"],
}


def add_lora(encoder: Any, rank: int, without: Sequence[nn.Module] = ()) -> Any:
    """Put LoRA factors into the encoder, in place; they alone train.

    The factors' matrix A is drawn from torch's global random state, see `seeded`; B is zero.
    The encoder and not the whole classifier is given to peft: the head stays as it is (peft
    would put a copy beside the original, and freeze those head layers it doesn't know by name).

    Args:
        encoder: a `transformers` model without a head.
        rank: of the factors.
        without: layers of the encoder that get none.

    Returns:
        What can merge them, peft's `LoraModel`.

    Raises:
        InputError: peft isn't installed, or which layers to give factors isn't known.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise InputError(
            '--tune lora needs peft: pip install "rnnopt[meta]", or use --tune head or full'
        ) from error
    kind = encoder.config.model_type
    left_out = {id(module) for layer in without for module in layer.modules()}
    names = [name for name, module in encoder.named_modules() if id(module) in left_out]
    # alpha = rank: the product is added unscaled, whatever the rank
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=LORA_TARGETS.get(kind),
        exclude_modules=names or None,
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            # peft sees by itself that GPT-2's layers are stored transposed, and says so
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            return LoraModel(encoder, config, "default")
    except ValueError as error:
        raise InputError(
            f"no LoRA for {kind} models ({first_line(error)}); use --tune head or --tune full"
        ) from error

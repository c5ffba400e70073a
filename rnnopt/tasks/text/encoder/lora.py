"""Low-rank factors (Hu et al. 2021, arXiv:2106.09685) put into an encoder by `peft`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.storage.files import save_tensors
from rnnopt.tasks.text.encoder.loading import first_line

ADAPTER_FILE = "adapter_model.safetensors"  # peft's name for it
# The query and value projections of encoders for which peft has no defaults.
LORA_TARGETS = {
    "albert": ["query", "value"],
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "mpnet": ["attn.q", "attn.v"],
}


def add_lora(encoder: Any, rank: int, without: Sequence[nn.Module] = ()) -> Any:
    """Put LoRA factors into the encoder, in place.

    Afterwards the factors are the only parameters of the encoder that train.

    The matrix A of a factor is drawn from torch's global random state, see `seeded`; B is zero.
    peft gets the encoder and not the whole classifier, so that the head stays as it is. (peft would
    copy head layers that it knows by name, and freeze the others.)

    Args:
        encoder: a `transformers` model without a head.
        rank: the rank of the factors.
        without: layers of the encoder that get no factors.

    Returns:
        peft's `LoraModel`, which can merge the factors into the weights.

    Raises:
        InputError: peft isn't installed, or has no target layers for this kind of encoder.
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
    # with alpha = rank, the product is added unscaled
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=LORA_TARGETS.get(kind),
        exclude_modules=names or None,
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            # peft warns that it has noticed that GPT-2 stores its layers transposed
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            return LoraModel(encoder, config, "default")
    except ValueError as error:
        raise InputError(
            f"no LoRA for {kind} models ({first_line(error)}); use --tune head or --tune full"
        ) from error


def save_adapter(adapter: Any, model: Any, folder: Path, values: Mapping[str, Tensor]) -> None:
    """Write LoRA factors and head layers in peft's own format.

    Args:
        adapter: the result of `add_lora`.
        model: the module that the names of the values refer to.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        values: the factors and the parameters of head layers, by their names in `model`.
    """
    layers = [name.rpartition(".")[0] for name in values if not is_factor(name)]
    config = copy.deepcopy(adapter.peft_config["default"])
    config.modules_to_save = list(dict.fromkeys(layers)) or None
    config.base_model_name_or_path = getattr(model.config, "name_or_path", None)
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {adapter_key(name): value for name, value in values.items()}
    save_tensors(folder / ADAPTER_FILE, tensors, {})


def is_factor(name: str) -> bool:
    """Whether a parameter of this name is a LoRA factor."""
    return any(part in name for part in (".lora_A.", ".lora_B."))


def adapter_key(name: str) -> str:
    """A parameter's name in peft's files, which leave out the name of the adapter."""
    return "base_model.model." + (name.replace(".default.", ".") if is_factor(name) else name)

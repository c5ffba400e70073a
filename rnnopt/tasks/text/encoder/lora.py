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


def save_adapter(adapter: Any, model: Any, folder: Path, values: Mapping[str, Tensor]) -> None:
    """Write values of what trains beside a frozen encoder in peft's own format.

    Args:
        adapter: what `add_lora` returned.
        model: the whole classifier, or what else the names start from.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        values: by name in `model`: factors, and parameters of head layers.
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
    """A parameter's name in peft's files: without the adapter's own, which they don't store."""
    return "base_model.model." + (name.replace(".default.", ".") if is_factor(name) else name)

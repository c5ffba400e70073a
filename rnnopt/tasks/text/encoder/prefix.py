"""The outputs of frozen layers, which are computed once for each text and kept.

The layers below the lowest trainable parameter give the same output for a text at every step.
This output is kept, in memory or on disk, so that a step only runs the layers above.

Shapes: B batch, S sequence (tokens), D hidden size, C ways, R rows that are kept of a text: one for
each token without padding, and one for the pooler's output if the whole encoder is frozen.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rnnopt.errors import InputError
from rnnopt.tasks.text.encoder.layers import Reached, layer_stack, reach
from rnnopt.tasks.text.encoder.tokens import Batch, TokenCache

# Bytes of main memory for the outputs; further outputs are written to disk. 1 GiB holds 60 000
# texts of 12 tokens at hidden size 384.
MEMORY = 2**30
GPU_PIECE = 64  # texts that a GPU runs through the frozen layers together
PROBES = ("probe", "a longer probe of the same")


class Prefix:
    """The outputs of frozen layers, by text. `find_prefix` makes it.

    The outputs are correct as long as the frozen parameters keep their values.

    Args:
        model: a text classifier, on its device and without dropout.
        tokens: tokenises the texts.
        layers: the frozen layers, from the lowest on. Only the output of the last one is kept.
        memory: bytes of main memory to use before outputs are written to disk.
    """

    def __init__(
        self, model: Any, tokens: TokenCache, layers: Sequence[nn.Module], memory: int = MEMORY
    ) -> None:
        self._model, self._tokens, self._layers = model, tokens, layers
        names = {layer: name for name, layer in model.named_modules()}
        self._names = [names[layer] for layer in layers]
        self._store = _Store(memory)
        self._example: Any = None  # an output of the last layer, which shows its type

    def read(self, batch: Batch, texts: Sequence[str]) -> Tensor:
        """The outputs of the frozen layers for a batch, (B, R, D), on the batch's device.

        Args:
            batch: the tokenised texts.
            texts: the same B texts.

        Raises:
            InputError: the disk is full.
        """
        missing = [text for text in dict.fromkeys(texts) if text not in self._store]
        device = batch["input_ids"].device
        # On a CPU each text is run alone: its output must not depend on the texts beside it, or a
        # resumed run would differ in the last bit from a run that was never stopped.
        size = GPU_PIECE if device.type == "cuda" else 1
        lengths = dict(zip(missing, self._tokens.lengths(missing)))
        missing.sort(key=lengths.__getitem__)
        for start in range(0, len(missing), size):
            piece = missing[start : start + size]
            for text, rows in zip(piece, self._compute(piece, device)):
                self._store.put(text, rows)
        return self._assemble(batch, [self._store.get(text) for text in texts])

    def logits(self, module: nn.Module, batch: Mapping[str, Tensor], states: Tensor) -> Tensor:
        """Logits (B, C) of the model, or of a functional copy, from the result of `read`."""
        output = _like(self._example, states)
        with ExitStack() as stack:
            for name in self._names:
                layer = module.get_submodule(name)
                stack.enter_context(_forward(layer, lambda *args, **kwargs: output))
            return cast(Tensor, module(**batch).logits)

    def works(self, device: torch.device) -> bool:
        """Whether two texts have the same logits with and without the kept outputs."""
        try:
            batch = self._tokens.batch(PROBES, device)
            with torch.enable_grad():  # shows whether a parameter below trains
                frozen = not _flat(self._run(batch)).requires_grad
            # run alone: if padding changes a text's output, the outputs can't be kept
            alone = [rows for text in PROBES for rows in self._compute([text], device)]
            states = self._assemble(batch, alone)
            with torch.no_grad():
                plain, quick = self._model(**batch).logits, self.logits(self._model, batch, states)
            return frozen and torch.allclose(quick, plain, rtol=1e-4, atol=1e-5)
        except Exception:  # for other architectures, all layers run at every step
            return False

    def _compute(self, texts: Sequence[str], device: torch.device) -> list[Tensor]:
        """The rows (R, D) of each text, on the CPU."""
        # tensors that are made in a caller's inference mode could not be used in a graph
        with torch.inference_mode(False), torch.no_grad():
            batch = self._tokens.batch(texts, device)
            self._example = self._run(batch)
            states = _flat(self._example)
            mask = _rows(batch, states.shape[1])
            return [rows[chosen].cpu() for rows, chosen in zip(states, mask)]

    def _assemble(self, batch: Batch, rows: Sequence[Tensor]) -> Tensor:
        """The rows of all texts padded to the batch's length, (B, R, D)."""
        with torch.inference_mode(False), torch.no_grad():
            ids = batch["input_ids"]
            together = torch.cat(list(rows)).to(ids.device)
            length = ids.shape[1] + (_pooled(self._example) is not None)
            states = together.new_zeros(len(rows), length, together.shape[1])
            states[_rows(batch, length)] = together
            return states

    def _run(self, batch: Batch) -> Any:
        """The last frozen layer's output. The layers above it are not run."""

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise Reached(output)

        return reach(self._model, batch, self._layers[-1].register_forward_hook(stop))


def find_prefix(model: Any, tokens: TokenCache, device: torch.device) -> Prefix | None:
    """A `Prefix` of all frozen layers; None if there are none, or if the logits would change.

    Args:
        model: a text classifier, on its device and without dropout.
        tokens: tokenises the texts.
        device: the device that the model is on.
    """
    body = model.base_model
    layers = [body]
    if not _frozen(body):
        # Frozen embeddings alone save nothing: a word is looked up as fast as a kept output.
        layers = list(itertools.takewhile(_frozen, layer_stack(body) or []))
    prefix = Prefix(model, tokens, layers) if layers else None
    return prefix if prefix is not None and prefix.works(device) else None


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Replace the module's forward pass for a block; its attributes, which models read, stay."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _frozen(module: nn.Module) -> bool:
    return not any(param.requires_grad for param in module.parameters())


def _pooled(output: Any) -> Tensor | None:
    return output.get("pooler_output") if isinstance(output, Mapping) else None


def _flat(output: Any) -> Tensor:
    """The hidden states (B, R, D) in the output of a layer or an encoder."""
    pooled = _pooled(output)
    if pooled is not None:
        return torch.cat([output["last_hidden_state"], pooled.unsqueeze(1)], dim=1)
    if isinstance(output, Mapping):
        return output["last_hidden_state"]
    return output[0] if isinstance(output, tuple) else output


def _like(example: Any, states: Tensor) -> Any:
    """An output of the same type as the example that holds these hidden states."""
    kind: Any = type(example)
    if _pooled(example) is not None:
        return kind(last_hidden_state=states[:, :-1], pooler_output=states[:, -1])
    if isinstance(example, Mapping):
        return kind(last_hidden_state=states)
    return (states, *[None] * (len(example) - 1)) if isinstance(example, tuple) else states


def _rows(batch: Batch, length: int) -> Tensor:
    """Which rows are kept, (B, length), bool: all rows except padding."""
    mask = batch["attention_mask"].bool()
    return nn.functional.pad(mask, (0, length - mask.shape[1]), value=True)


class _Store:
    """The rows (R, D) of each text, in memory up to a limit and then in a temporary file.

    Args:
        memory: the limit in bytes.
    """

    def __init__(self, memory: int) -> None:
        self._left = memory
        self._rows: dict[str, Tensor] = {}
        self._places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self._file: Any = None

    def __contains__(self, text: str) -> bool:
        return text in self._rows or text in self._places

    def put(self, text: str, rows: Tensor) -> None:
        self._left -= rows.nbytes
        if self._left >= 0:
            self._rows[text] = rows
            return
        content = rows.contiguous().view(torch.uint8).numpy().tobytes()
        try:
            # a write to a full disk raises an error, a write to a memory map crashes
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
                weakref.finalize(self, self._file.close)
            place = self._file.seek(0, 2)
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"can't keep activations in {tempfile.gettempdir()}: {error.strerror}; let TMPDIR "
                "name a folder with more room"
            ) from error
        self._places[text] = (place, rows.shape, rows.dtype)

    def get(self, text: str) -> Tensor:
        if text in self._rows:
            return self._rows[text]
        place, shape, dtype = self._places[text]
        size = shape.numel() * dtype.itemsize
        content = np.array(np.memmap(self._file, np.uint8, "r", place, (size,)))
        return torch.from_numpy(content).view(dtype).view(shape)

"""What the examples of language share: rows of files, a tokenizer, pretraining, and new languages.

A new language is a cipher: letters of a known language, exchanged. It has its grammar and none of
its words, so that meta-training can adapt to as many unseen languages as it likes.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from rnnopt import InputError
from rnnopt.cli.progress import progress_bar

transformers.logging.set_verbosity_error()  # of its remarks on models that are made here

PAD, START, END = "<pad>", "<s>", "</s>"  # ids 0, 1, 2
IGNORED = -100  # the label that transformers leaves out of the loss
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiouyäöüàâéèêôî"


def find(folder: Path, stem: str) -> Path:
    """The file ``<stem>.jsonl`` or ``<stem>.tsv`` of a folder, plain or gzip.

    Raises:
        InputError: there is none.
    """
    names = [f"{stem}{suffix}{zipped}" for suffix in (".jsonl", ".tsv") for zipped in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: has none of {', '.join(names)}; name the folder with --data")


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of JSON lines, or of a TSV file with a header, and where each stands.

    Raises:
        InputError: the file is not UTF-8 or not gzip, a line is no JSON object, or a row of a
            table has another number of columns than the header.
    """
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            lines = stream.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read ({error}); copy it again, as UTF-8") from error
    if ".jsonl" in file.name:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file}, line {number}", _object(f"{file}, line {number}", line)
        return
    table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(table, [])
    for number, cells in enumerate(table, 2):
        if cells and len(cells) != len(header):
            raise InputError(
                f"{file}, line {number}: has {len(cells)} columns, the header {len(header)} "
                f"({', '.join(header)}); a row needs a cell in each column: fill it in or delete it"
            )
        if cells:
            yield f"{file}, line {number}", dict(zip(header, cells))


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); write an object a line") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: a JSON {type(found).__name__}; write an object a line")
    return found


def train_tokenizer(texts: Iterable[str], size: int, tags: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer (Sennrich et al. 2016, arXiv:1508.07909), which has all letters.

    Args:
        texts: what it learns from.
        size: the number of tokens.
        tags: further tokens, which no text gives.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, START, END, *tags],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def padded(sequences: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    """Sequences of token ids as one tensor, (B, L), filled up at their ends."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in sequences])


def cipher(seed: int) -> dict[int, int]:
    """A language that nobody speaks, for `str.translate`: consonants and vowels are exchanged."""
    drawn, table = random.Random(seed), {}
    for letters in (CONSONANTS, VOWELS):
        others = "".join(drawn.sample(letters, len(letters)))
        table |= str.maketrans(letters + letters.upper(), others + others.upper())
    return table


def pretrain(
    module: nn.Module, loss: Callable[[random.Random], Tensor], steps: int, lr: float, seed: int
) -> dict[str, Tensor]:
    """Train a module by AdamW with one cycle of the learning rate.

    Args:
        module: the module, trained in place.
        loss: makes the loss of a batch, drawn with the random state that it is given.
        steps: the number of steps.
        lr: the highest learning rate.
        seed: decides the batches.

    Returns:
        The module's parameters by name, without those that are tied to another one.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    drawn = random.Random(seed)
    with progress_bar("pretrain", steps) as bar:
        for _ in range(steps):
            optimizer.zero_grad()
            found = loss(drawn)
            found.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(note=f"loss {found.item():.2f}")
    return {name: param.detach() for name, param in module.named_parameters()}

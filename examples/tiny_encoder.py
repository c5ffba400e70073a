"""A tiny encoder for the examples, so that they run offline and in seconds.

It stands in for a pretrained one: a BERT of 2 layers, 64 wide, that learns for some seconds to tell
modules of Python's standard library apart by their docstrings. The modules of `MODULES` are left
out: they are the new classes that the examples adapt to.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rnnopt.data.embedded import stdlib_corpus
from rnnopt.tasks.text.encoder.loading import silence, small_bert

MODULES = ("asyncio", "email", "logging", "turtle", "xml")  # the new classes
MAX_LENGTH = 32  # tokens of a docstring
BATCH = 64  # docstrings a step

# peft 0.21 asks transformers 5.23 for an attribute under its old name
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits, (B, classes), and with labels, (B,), the mean loss in nats."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        logits = self.head((tokens * weights).sum(dim=1) / weights.sum(dim=1))
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def encode(tokenizer, texts: list[str], labels: list[int]) -> dict[str, Tensor]:
    """A batch for the classifier."""
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )
    names = ("input_ids", "attention_mask")
    return {name: batch[name] for name in names} | {"labels": torch.tensor(labels)}


def pretrained(steps: int = 100, seed: int = 0):
    """An encoder that has learned from all modules but `MODULES`, and its tokenizer."""
    corpus = stdlib_corpus()
    known = sorted(set(corpus.labels) - set(MODULES))
    rows = [
        (text, known.index(label))
        for text, label in zip(corpus.texts, corpus.labels)
        if label not in MODULES
    ]
    with TemporaryDirectory() as folder, silence():
        small_bert([text for text, _ in rows], seed=seed, folder=folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        encoder = transformers.AutoModel.from_pretrained(Path(folder), add_pooling_layer=False)
    torch.manual_seed(seed)
    model = MeanPooledClassifier(encoder, len(known)).eval()  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    drawn = random.Random(seed)
    for _ in range(steps):
        texts, labels = zip(*drawn.sample(rows, BATCH))
        optimizer.zero_grad()
        model(**encode(tokenizer, list(texts), list(labels)))["loss"].backward()
        optimizer.step()
        schedule.step()
    return encoder, tokenizer


def new_classes(shots: int, queries: int, seed: int = 0) -> tuple[list[tuple[str, int]], ...]:
    """(text, class) pairs of `MODULES`: so many of each to learn from, and to judge by."""
    corpus, drawn = stdlib_corpus(), random.Random(seed)
    support, query = [], []
    for number, module in enumerate(MODULES):
        texts = [text for text, label in zip(corpus.texts, corpus.labels) if label == module]
        chosen = drawn.sample(texts, shots + queries)
        support += [(text, number) for text in chosen[:shots]]
        query += [(text, number) for text in chosen[shots:]]
    return support, query


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Share of the batch that the model gets right."""
    with torch.no_grad():
        right = model(**batch)["logits"].argmax(dim=1) == batch["labels"]
    return right.float().mean().item()

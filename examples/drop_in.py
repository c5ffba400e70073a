"""A plain torch loop with `LearnedOptimizer` in place of AdamW.

    python examples/drop_in.py

The task: five modules of Python's standard library, ten docstrings of each to learn from; which
module is a new docstring from? The classifier is a small network on bags of word pieces. AdamW runs
at several learning rates, because nobody knows the right one beforehand; `LearnedOptimizer` has
nothing to set. It was meta-trained on text encoders, so this network is new to it.

Offline, about 15 seconds on one core. Prints accuracy on new docstrings after so many steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from rnnopt import LearnedOptimizer
from rnnopt.data.embedded import stdlib_corpus
from rnnopt.tasks.text.encoder.loading import word_piece

MODULES = ("asyncio", "email", "logging", "turtle", "xml")
SHOTS, QUERIES = 10, 30  # docstrings of each module to learn from, and to judge by
TASKS = 4  # draws of docstrings, over which accuracy is averaged
BUDGETS = (1, 3, 5, 10, 20)  # steps

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "LearnedOptimizer": lambda params: LearnedOptimizer(params),
    **{
        f"AdamW, lr={lr}": lambda params, lr=lr: torch.optim.AdamW(params, lr=lr)
        for lr in (1e-3, 1e-2, 1e-1)
    },
}


def main() -> None:
    """Print one row for each optimizer."""
    corpus = stdlib_corpus()
    tokenizer = word_piece(corpus.texts)
    texts = {name: [] for name in MODULES}
    for text, label in zip(corpus.texts, corpus.labels):
        if label in texts:
            texts[label].append(text)

    print("accuracy after steps  " + "".join(f"{budget:>7}" for budget in BUDGETS))
    for name, optimizer in OPTIMIZERS.items():
        runs = []
        for seed in range(TASKS):
            drawn = random.Random(seed)
            rows = [drawn.sample(texts[module], SHOTS + QUERIES) for module in MODULES]
            support = bags(tokenizer, [row[:SHOTS] for row in rows])
            query = bags(tokenizer, [row[SHOTS:] for row in rows])
            torch.manual_seed(seed)  # the same initial weights for every optimizer
            model = nn.Sequential(
                nn.Linear(len(tokenizer), 64), nn.ReLU(), nn.Linear(64, len(MODULES))
            )
            runs.append(adapt(model, optimizer(model.parameters()), support, query))
        means = torch.tensor(runs).mean(dim=0)
        print(f"{name:<22}" + "".join(f"{mean:7.3f}" for mean in means))


def adapt(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
) -> list[float]:
    """Train on the support set in full batches; accuracy on the query set after each budget."""
    found = []
    for step in range(1, max(BUDGETS) + 1):
        optimizer.zero_grad()
        cross_entropy(model(support[0]), support[1]).backward()
        optimizer.step()
        if step in BUDGETS:
            with torch.no_grad():
                right = model(query[0]).argmax(dim=1) == query[1]
            found.append(right.float().mean().item())
    return found


def bags(tokenizer, rows: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Texts of each class as bags of word pieces, (B, V), and their classes, (B,)."""
    texts = [text for row in rows for text in row]
    counts = torch.zeros(len(texts), len(tokenizer))
    for count, ids in zip(counts, tokenizer(texts, add_special_tokens=False)["input_ids"]):
        count.scatter_add_(0, torch.tensor(ids), torch.ones(len(ids)))
    labels = torch.arange(len(rows)).repeat_interleave(len(rows[0]))
    return normalize(torch.log1p(counts)), labels


if __name__ == "__main__":
    main()

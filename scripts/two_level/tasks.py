"""Batches of few-shot tasks of one shape, and a rule's step on all of them at once; no command.

Shapes: B tasks, n texts of each, S tokens of each, D hidden units, C classes, P tensors that train,
N coordinates of one of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from encoder import Encoder
from texts import Labelled, Texts
from torch import Tensor

from rnnopt.tasks.text.estimator.objective.pairs import pair_loss

WORDS = "words"  # the name of the word embeddings among the tensors that train
RANDOM_HEAD = 0.02  # standard deviation of a random head, as in BERT
TEMPERATURES = [0.02 * 10 ** (k / 12) for k in range(61)]
PARTS_OF_LETTERS = {"q": "query", "k": "key", "v": "value", "o": "attention_output"}


@dataclass(frozen=True)
class Spec:
    """What the tasks of a batch have in common.

    Args:
        encoder: of the texts.
        kind: what trains: "lora" (with the head), "full" (these layers and the head) or "head".
        layers: how many layers from the top train, or lie above the cached hidden states.
        pooling: one of `encoder.POOLINGS`.
        head: how it begins: "random", "zero", "prototype" (class means) or "logistic".
        head_scale: of a prototype head; of a logistic one, the inverse strength of its penalty.
        rank: of LoRA, with `lora_scale` times the product of its factors.
        targets: the matrices with LoRA, letters of `PARTS_OF_LETTERS`.
        ways: classes. `shots` and `queries` are the texts of each.
        length: tokens of a text.
        batch: texts of a minibatch; None means all.
        steps: of the rule.
        label_noise: the share of support labels that are replaced at random.
        dropout: while the loss of the support set is taken.
        clip: the largest norm of a task's gradient; 0 means any.
        rescale: standard deviation of the logarithm of a random factor on every tensor.
        words: with "full" of all layers, whether word embeddings train.
        feature_scale: a factor on the pooled outputs; encoders differ in their length.
        pairs: whether the tasks' loss is that of pairs of texts, by which `rnnopt.TextClassifier`
            adapts an encoder. No head trains; the one that is judged is fitted to what the encoder
            makes of the support texts by then, of class means.
    """

    encoder: Encoder
    kind: str
    layers: int
    pooling: str
    head: str
    ways: int
    shots: int
    queries: int
    length: int
    steps: int
    head_scale: float = 1.0
    rank: int = 8
    lora_scale: float = 2.0
    targets: str = "qv"
    batch: int | None = None
    label_noise: float = 0.0
    dropout: float = 0.0
    clip: float = 0.0
    rescale: float = 0.0
    words: bool = False
    feature_scale: float = 1.0
    pairs: bool = False

    def __str__(self) -> str:
        plain = {name: value for name, value in vars(self).items() if name != "encoder"}
        return f"{self.encoder.name} {plain}"


def fitted_head(features: Tensor, labels: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """A prototype or logistic head for each task: weights (B, C, D) and biases (B, C).

    Args:
        features: of the support texts, (B, n, D).
        labels: (B, n).
        spec: `head`, `head_scale` and `ways`.
    """
    one_hot = F.one_hot(labels, spec.ways).float()
    square = (features * features).sum(-1).mean(1).view(-1, 1, 1)
    if spec.head == "prototype":
        mean, scale = features.mean(1, keepdim=True), spec.head_scale / square
        counts = one_hot.sum(1).unsqueeze(-1).clamp(min=1)
        centred = one_hot.mT @ features / counts - mean
        return scale * centred, -(scale * centred * (centred + mean)).sum(-1)
    weight = torch.zeros(len(features), spec.ways, features.shape[-1])
    bias = torch.zeros(len(features), spec.ways)
    texts = features.shape[1]
    rates = (0.3 / square.sqrt(), 0.3 * torch.ones_like(square)[:, 0])
    moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in (weight, bias)]
    for step in range(1, 81):  # Adam: scikit-learn takes one task at a time
        residual = torch.softmax(features @ weight.mT + bias.unsqueeze(1), -1) - one_hot
        residual = residual / texts
        grads = (residual.mT @ features + weight / (spec.head_scale * texts), residual.sum(1))
        for param, grad, (moment, square), rate in zip((weight, bias), grads, moments, rates):
            moment.mul_(0.9).add_(grad, alpha=0.1)
            square.mul_(0.99).add_(grad * grad, alpha=0.01)
            root = (square / (1 - 0.99**step)).sqrt() + 1e-8
            param.sub_(rate * (moment / (1 - 0.9**step)) / root)
    return weight, bias


def query_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each task, in nats, and the same at the task's best temperature; (B,) each.

    Args:
        logits: (B, n, C).
        labels: (B, n).
    """
    tasks, texts, _ = logits.shape

    def loss(scaled: Tensor, target: Tensor) -> Tensor:
        each = F.cross_entropy(scaled.flatten(0, -2), target.flatten(), reduction="none")
        return each.view(*scaled.shape[:-1]).mean(-1)

    with torch.no_grad():
        tried = torch.tensor(TEMPERATURES, device=logits.device)
        at_all = loss(logits / tried[:, None, None, None], labels.expand(len(tried), tasks, texts))
        best = tried[at_all.argmin(0)]
    return loss(logits, labels), loss(logits / best[:, None, None], labels)


class TaskBatch:
    """B tasks of one shape: their texts, and the tensors that train.

    Args:
        texts: to draw from.
        spec: the tasks' shape.
        episodes: support and query texts of each task.
        seed: of initial values, noise, and the order of minibatches.

    Attributes:
        start: the tensors that train, flat, (B, N) each.
        shapes: theirs, for one task.
        alike: the indices of tensors of one shape, which a rule can step together.
    """

    def __init__(
        self, texts: Texts, spec: Spec, episodes: Sequence[tuple[Labelled, Labelled]], seed: int
    ) -> None:
        self.spec, self.size = spec, len(episodes)
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        self._rng, self._order = random.Random(seed), list[int]()
        encoder = spec.encoder
        self.layers = list(range(encoder.layers - spec.layers, encoder.layers))
        words = spec.words and spec.kind == "full" and self.layers[0] == 0
        support, query = ([episode[i] for episode in episodes] for i in (0, 1))
        self.inputs, self.mask, self.labels = self._read(texts, support, words)
        self.query_inputs, self.query_mask, self.query_labels = self._read(texts, query, words)
        if spec.label_noise:
            flipped = torch.rand(self.labels.shape, generator=generator) < spec.label_noise
            other = torch.randint(0, spec.ways, self.labels.shape, generator=generator)
            self.labels = torch.where(flipped, other, self.labels)
        trained = self._trained(generator, words)
        self.names = list(trained)
        self.shapes = [tuple(leaf.shape[1:]) for leaf in trained.values()]
        by_shape: dict[tuple[Any, ...], list[int]] = {}
        for index, (name, form) in enumerate(zip(self.names, self.shapes)):
            by_shape.setdefault((name == WORDS, form), []).append(index)
        self.alike = list(by_shape.values())
        self._factors = [
            torch.exp(torch.randn(self.size, 1, generator=generator) * spec.rescale)
            if spec.rescale
            else None
            for _ in self.names
        ]
        flat = (leaf.reshape(self.size, -1) for leaf in trained.values())
        self.start = [
            leaf if factor is None else leaf / factor for leaf, factor in zip(flat, self._factors)
        ]
        if spec.kind == "head":
            with torch.no_grad():
                self.inputs = self.features({}, self.inputs, self.mask)
                self.query_inputs = self.features({}, self.query_inputs, self.query_mask)

    def _read(
        self, texts: Texts, episodes: list[Labelled], words: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of the lowest layer in `layers`, or token ids; mask; labels."""
        encoder, depth = self.spec.encoder, self.layers[0]
        which, tokens, mask, labels = texts.batch(episodes, self.spec.length)
        if words:
            return tokens, mask, labels
        if depth and not encoder.distilled and texts.hidden:
            hidden = texts.cached(which, depth, self.spec.length, tokens.shape[-1])
            return hidden, mask, labels
        with torch.no_grad():
            hidden = encoder.embed(tokens)
            hidden = encoder.run(encoder.weights, range(depth), hidden, mask) if depth else hidden
        return hidden, mask, labels

    def _trained(self, generator: torch.Generator, words: bool) -> dict[str, Tensor]:
        """The tensors that train, (B, ...) each, in the order in which random ones are drawn."""
        spec, encoder = self.spec, self.spec.encoder
        names = [name for index in self.layers for name in encoder.layer_names(index)]
        if spec.pooling == "cls":
            names += ["pooler.weight", "pooler.bias"]
        self._frozen: dict[str, Tensor] = {name: encoder.weights[name] for name in names}
        trained: dict[str, Tensor] = {}
        if spec.kind == "full":
            for name, leaf in self._frozen.items():
                trained[name] = leaf.expand(self.size, *leaf.shape).clone()
            self._frozen = {}
        if words:
            trained[WORDS] = self._word_rows()
        self._frozen["lora_scale"] = torch.tensor(spec.lora_scale)
        if spec.kind == "lora":
            for index in self.layers:
                for letter in spec.targets:
                    name = f"{index}.{PARTS_OF_LETTERS[letter]}"
                    out, wide = encoder.weights[f"{name}.weight"].shape
                    uniform = torch.rand(self.size, spec.rank, wide, generator=generator) * 2 - 1
                    trained[f"{name}.A"] = uniform / math.sqrt(wide)
                    trained[f"{name}.B"] = torch.zeros(self.size, out, spec.rank)
        if spec.pairs:
            return trained
        shape = (self.size, spec.ways, encoder.hidden_size)
        head = torch.randn(shape, generator=generator) * RANDOM_HEAD
        trained["head.weight"] = head * (spec.head == "random")
        trained["head.bias"] = torch.zeros(self.size, spec.ways)
        if spec.head in ("prototype", "logistic"):
            with torch.no_grad():
                features = self.features(trained, self.inputs, self.mask)
                fitted = fitted_head(features, self.labels, spec)
            trained["head.weight"], trained["head.bias"] = fitted
        return trained

    def _word_rows(self) -> Tensor:
        """Embeddings of the words that a task's texts have, (B, rows, D); ids become their rows."""
        encoder, both = self.spec.encoder, (self.inputs, self.query_inputs)
        used = [
            torch.cat([ids[task].flatten() for ids in both]).unique() for task in range(self.size)
        ]
        rows = max(len(ids) for ids in used)
        table = torch.zeros(self.size, rows, dtype=torch.long)
        for task, ids in enumerate(used):
            table[task, : len(ids)] = ids
        self.inputs, self.query_inputs = (
            torch.stack([torch.searchsorted(ids, own.contiguous()) for ids, own in zip(used, x)])
            for x in both
        )
        return encoder.words[table]

    def features(
        self, trained: dict[str, Tensor], inputs: Tensor, mask: Tensor, dropout: float = 0.0
    ) -> Tensor:
        """The encoder's pooled outputs, (B, n, D), with these tensors in place of its own."""
        encoder = self.spec.encoder
        if WORDS in trained:
            table = trained[WORDS]
            rows = inputs + torch.arange(self.size).view(-1, 1, 1) * table.shape[1]
            inputs = encoder.place(F.embedding(rows, table.flatten(0, 1)))
        weights = {**self._frozen, **trained}
        pooling = self.spec.pooling
        found = encoder.features(weights, self.layers, pooling, inputs, mask, dropout)
        return found * self.spec.feature_scale

    def named(self, params: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors that train in their shapes, (B, ...), their random factors applied."""
        return {
            name: (param if factor is None else param * factor).view(-1, *shape)
            for name, param, factor, shape in zip(self.names, params, self._factors, self.shapes)
        }

    def logits(
        self, params: Sequence[Tensor], inputs: Tensor, mask: Tensor, dropout: float = 0.0
    ) -> Tensor:
        """(B, n, C), of `inputs` and `mask` or of `query_inputs` and `query_mask`."""
        trained = self.named(params)
        if self.spec.kind != "head":
            inputs = self.features(trained, inputs, mask, dropout)
        return inputs @ trained["head.weight"].mT + trained["head.bias"].unsqueeze(1)

    def query_logits(self, params: Sequence[Tensor]) -> Tensor:
        """(B, n, C)"""
        if not self.spec.pairs:
            return self.logits(params, self.query_inputs, self.query_mask)
        trained = self.named(params)
        support = F.normalize(self.features(trained, self.inputs, self.mask), dim=-1)
        query = self.features(trained, self.query_inputs, self.query_mask)
        weight, bias = fitted_head(support, self.labels, self.spec)
        return F.normalize(query, dim=-1) @ weight.mT + bias.unsqueeze(1)

    def query_losses(self, params: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As the function of that name, and accuracies without a gradient; (B,) each.

        Where the head is fitted to the pairs' encoder, its temperature is too, so that both losses
        are those at the best one.
        """
        logits = self.query_logits(params)
        plain, best = query_losses(logits, self.query_labels)
        correct = (logits.argmax(-1) == self.query_labels).float().mean(1).detach()
        return (best if self.spec.pairs else plain), best, correct

    def restart(self, seed: int) -> None:
        """Draw the minibatches anew, from this seed."""
        self._rng, self._order = random.Random(seed), []

    def support_loss(self, params: Sequence[Tensor]) -> Tensor:
        """The loss of the next minibatch in nats, summed over the tasks."""
        texts, batch = self.labels.shape[1], self.spec.batch
        inputs, mask, labels = self.inputs, self.mask, self.labels
        if self.spec.pairs:
            vectors = self.features(self.named(params), inputs, mask, self.spec.dropout)
            alike = (labels.unsqueeze(1) == labels.unsqueeze(2)).float()
            return pair_loss(vectors, alike, torch.ones_like(alike[:, 0])).sum()
        if batch and batch < texts:
            if len(self._order) < batch:
                order = list(range(texts))
                self._rng.shuffle(order)
                self._order += order
            chosen, self._order = torch.tensor(self._order[:batch]), self._order[batch:]
            inputs, mask, labels = inputs[:, chosen], mask[:, chosen], labels[:, chosen]
        logits = self.logits(params, inputs, mask, self.spec.dropout)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * self.size

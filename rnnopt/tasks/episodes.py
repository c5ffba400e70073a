"""Episodes from a corpus: N-way K-shot tasks, each of which depends on seed and index only.

Shapes: N ways (classes), K shots (support texts of each class), Q queries (of each class).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rnnopt.data.corpus import ClassKey, Corpus, text_key
from rnnopt.errors import InputError


@dataclass(frozen=True)
class Episode:
    """A task: a support set to adapt to, and a disjoint query set to score on, both shuffled.

    Attributes:
        support: indices of texts in the corpus, (N*K,) int64.
        support_labels: their labels, 0 to N - 1, (N*K,) int64.
        query: indices of texts in the corpus, (N*Q,) int64.
        query_labels: their labels, (N*Q,) int64.
        classes: label i stands for classes[i]. Each episode has an order of its own.
    """

    support: np.ndarray
    support_labels: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray
    classes: tuple[ClassKey, ...]


class EpisodeSampler:
    """Draw episodes, each from one domain of a corpus.

    Episode i depends on the corpus, the arguments and i only. A stopped run can therefore go on
    without a saved state, and two equal samplers give the same episodes. (Another version of numpy
    may give other episodes, see NEP 19.) A text that differs from an earlier text of its domain
    only in case and white space is never drawn, so that it can't be in support and query set both.

    Args:
        corpus: the corpus that the texts are drawn from.
        ways: N, the number of classes. If there are several values, each episode draws one of them,
            uniformly.
        shots: K, the number of support texts of each class; several values as for `ways`.
        queries: Q, the number of query texts of each class.
        seed: decides the episodes; at least 0.
        domain_weights: the relative frequency of each domain among those that have N classes with
            K + Q texts. A domain that is not named has the weight 1.
        most_support: the largest N K. For each N, only those values of `shots` are drawn that stay
            within it. None means no limit.

    Raises:
        InputError: a value is out of range, or no domain has enough texts for some N and K.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        ways: int | Sequence[int],
        shots: int | Sequence[int],
        queries: int,
        seed: int,
        domain_weights: Mapping[str, float] | None = None,
        most_support: int | None = None,
    ) -> None:
        self.corpus = corpus
        self.ways = _at_least(2, "ways", ways)
        self.shots = _at_least(1, "shots", shots)
        (self.queries,) = _at_least(1, "queries", queries)
        (self.seed,) = _at_least(0, "seed", seed)
        self.domain_weights = _checked_weights(domain_weights or {}, corpus)
        self._shots_of = {n: self._shots_within(most_support, n) for n in dict.fromkeys(self.ways)}
        self._texts = _distinct_texts(corpus)
        self._check_classes()
        self._eligible = {k: self.eligible_classes(k) for k in dict.fromkeys(self.shots)}
        self._usable = {
            (n, k): self._usable_domains(n, k)
            for n, shots_of in self._shots_of.items()
            for k in dict.fromkeys(shots_of)
        }

    def eligible_classes(self, shots: int) -> dict[str, list[ClassKey]]:
        """The classes of each domain that have enough distinct texts for shots and queries."""
        eligible: dict[str, list[ClassKey]] = {domain: [] for domain, _ in self._texts}
        for key, indices in self._texts.items():
            if len(indices) >= shots + self.queries:
                eligible[key[0]].append(key)
        return eligible

    def sample(self, index: int) -> Episode:
        """Episode number `index`, the same at every call.

        Args:
            index: at least 0.

        Raises:
            InputError: the index is negative.
        """
        (index,) = _at_least(0, "index", index)
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, index]))
        ways = self.ways[generator.integers(len(self.ways))]
        within = self._shots_of[ways]
        shots = within[generator.integers(len(within))]
        domains, odds = self._usable[ways, shots]
        keys = self._eligible[shots][domains[generator.choice(len(domains), p=odds)]]
        # choice() without replacement also shuffles: the order of labels is part of the draw
        classes = tuple(keys[i] for i in generator.choice(len(keys), ways, replace=False))
        drawn = np.stack(
            [
                generator.choice(self._texts[key], shots + self.queries, replace=False)
                for key in classes
            ]
        )  # (N, K + Q)
        support, support_labels = _shuffled(drawn[:, :shots], generator)
        query, query_labels = _shuffled(drawn[:, shots:], generator)
        return Episode(support, support_labels, query, query_labels, classes)

    def _shots_within(self, most_support: int | None, ways: int) -> tuple[int, ...]:
        if most_support is None:
            return self.shots
        within = tuple(shots for shots in self.shots if ways * shots <= most_support)
        if not within:
            raise InputError(
                f"most_support={most_support} (--most-support): {ways}-way {min(self.shots)}-shot "
                f"tasks need {ways * min(self.shots)} support texts; raise it, or lower the ways"
            )
        return within

    def _check_classes(self) -> None:
        if len(self._texts) < 2:
            raise InputError(
                f"{len(self._texts)} classes in the corpus, a task needs at least 2: "
                "add labelled texts, or check the label column"
            )
        counts = Counter(domain for domain, _ in self._texts)
        domain, most = counts.most_common(1)[0]
        if max(self.ways) > most:
            hint = ", or leave out the domain column" if len(counts) > 1 else ""
            raise InputError(
                f"{max(self.ways)}-way episodes need a domain with {max(self.ways)} classes; "
                f"{domain} has {most}, and no domain has more: lower --ways{hint}; to compare "
                "on all classes of a file use --report-on all --tuning-data stdlib"
            )

    def _usable_domains(self, ways: int, shots: int) -> tuple[list[str], np.ndarray]:
        counts = {domain: len(keys) for domain, keys in self._eligible[shots].items()}
        usable = [domain for domain, count in counts.items() if count >= ways]
        if not usable:
            domain = max(counts, key=counts.__getitem__)
            raise InputError(
                f"{ways}-way {shots}-shot with {self.queries} queries needs {ways} classes with "
                f"{shots + self.queries} texts; {domain} has {counts[domain]}: "
                "lower --ways, --shots or --queries"
            )
        weights = np.array([self.domain_weights.get(domain, 1.0) for domain in usable])
        weights /= weights.max()  # otherwise the sum of huge weights would be infinite
        return usable, weights / weights.sum()


def _at_least(least: int, name: str, values: int | Sequence[int]) -> tuple[int, ...]:
    found = tuple(values) if isinstance(values, Sequence | np.ndarray) else (values,)
    if not found:
        raise InputError(f"{name} is empty: give at least one number")
    for value in found:
        if not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name}={value}: must be a whole number, at least {least}")
    return tuple(map(int, found))


def _checked_weights(weights: Mapping[str, float], corpus: Corpus) -> dict[str, float]:
    known = list(dict.fromkeys(corpus.domains))
    for domain, weight in weights.items():
        if domain not in known:
            raise InputError(
                f"domain_weights names {domain!r}, which the corpus does not have; "
                f"its domains are {', '.join(known)}"
            )
        if not 0 < weight < math.inf:
            raise InputError(
                f"domain_weights[{domain!r}]={weight}: must be positive and finite; "
                "to leave a domain out, leave it out of the corpus"
            )
    return dict(weights)


def _distinct_texts(corpus: Corpus) -> dict[ClassKey, np.ndarray]:
    seen: set[tuple[str, str]] = set()
    texts: defaultdict[ClassKey, list[int]] = defaultdict(list)
    for index, domain in enumerate(corpus.domains):
        identity = domain, text_key(corpus.texts[index])
        if identity not in seen:
            seen.add(identity)
            texts[domain, corpus.labels[index]].append(index)
    return {key: np.array(indices, dtype=np.int64) for key, indices in texts.items()}


def _shuffled(indices: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Flatten (N, M) indices to (N*M,) in random order, with the rows as labels."""
    labels = np.repeat(np.arange(len(indices), dtype=np.int64), indices.shape[1])
    order = generator.permutation(indices.size)
    return indices.reshape(-1)[order], labels[order]

"""The sources that --data names: their weights, and what is told of them before a run starts."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rnnopt.data.corpus import Corpus, listed, merge
from rnnopt.data.splits import PART_NAMES, Splits, check_disjoint, class_pair
from rnnopt.errors import InputError


def parse_sources(data: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Take ``PATH=WEIGHT`` apart.

    Args:
        data: paths, some with a weight. What exists under its whole name is a path.

    Returns:
        The paths, and the weights that are given, by path.

    Raises:
        InputError: a weight that is no positive, finite number.
    """
    paths, weights = [], {}
    for source in map(str, data):
        path, sign, text = source.rpartition("=")
        weighted = sign and path and not os.path.exists(source) and os.sep not in text
        paths.append(path if weighted else source)
        if weighted:
            weights[path] = _weight(source, text)
    return paths, weights


def _weight(source: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(
            f"--data {source}: weight {text!r} must be a positive, finite number, as in "
            f"{source.rpartition('=')[0]}=2; to leave a source out, don't name it"
        )
    return weight


def weigh(splits: Splits, weights: Mapping[str, float]) -> dict[str, float]:
    """Domain -> weight, so that sources are drawn in proportion to their weights.

    A source's weight is shared by its domains; 1 for a source that has none.

    Args:
        splits: read from sources.
        weights: by path.

    Returns:
        {} where no weight is given: then all domains are alike.
    """
    if not weights:
        return {}
    by_source = {os.path.normpath(path): weight for path, weight in weights.items()}
    shared: dict[str, float] = {}
    for path, source in splits.sources.items():
        domains = _domains(source)
        weight = by_source.get(os.path.normpath(path), 1.0)
        shared |= dict.fromkeys(domains, weight / len(domains))
    return shared


def describe(splits: Splits) -> dict[str, Any]:
    """What there is, in a form for a file.

    Args:
        splits: what was read.

    Returns:
        ``{"sources": [{"source", "domains", "weight", "duplicates", "classes": {part: count},
        "texts": {part: count}, "fingerprints": {part: 16 hex digits}}], "overlaps": [{"between":
        [name, name], "classes", "examples", "texts"}], "unsafe": the same of train, validation
        and test}``; only overlaps that there are, unsafe ones only with --allow-overlap.
    """
    sources = splits.sources or {_domains(splits)[0]: splits}
    wholes = {path: merge(_parts(source)) for path, source in sources.items()}
    parts = dict(zip(PART_NAMES, _parts(splits)))
    return {
        "sources": [_source(path, source, splits.weights) for path, source in sources.items()],
        "overlaps": _overlaps(wholes),
        "unsafe": _overlaps(parts),
    }


def overlap_lines(description: Mapping[str, Any]) -> list[str]:
    """What sources have in common, and what parts have that should have nothing.

    Args:
        description: from `describe`.
    """
    lines = [f"{_shared(overlap)}" for overlap in description["overlaps"]]
    return lines + [
        f"CAUTION: {_shared(overlap)}, which --allow-overlap accepts"
        for overlap in description["unsafe"]
        if overlap["classes"]
    ]


def _shared(overlap: Mapping[str, Any]) -> str:
    one, other = overlap["between"]
    examples = f" ({listed(overlap['examples'], most=3)})" if overlap["classes"] else ""
    return f"{one} and {other} overlap: classes {overlap['classes']}{examples}, " + (
        f"texts {overlap['texts']}"
    )


def _source(path: str, source: Splits, weights: Mapping[str, float]) -> dict[str, Any]:
    parts = dict(zip(PART_NAMES, _parts(source)))
    domains = _domains(source)
    return {
        "source": path,
        "domains": domains,
        "weight": sum(weights[domain] for domain in domains) if weights else None,
        "duplicates": sum(corpus.dropped for corpus in parts.values()),
        "classes": {part: len(corpus.classes) for part, corpus in parts.items()},
        "texts": {part: len(corpus) for part, corpus in parts.items()},
        "fingerprints": {part: corpus.fingerprint() for part, corpus in parts.items()},
    }


def _overlaps(corpora: Mapping[str, Corpus]) -> list[dict[str, Any]]:
    hashes = {
        name: {digest for digests in corpus.class_hashes.values() for digest in digests}
        for name, corpus in corpora.items()
    }
    found = []
    for one, other in itertools.combinations(corpora, 2):
        pairs = check_disjoint(corpora[one], corpora[other], allow_overlap=True)
        texts = len(hashes[one] & hashes[other])
        if pairs or texts:
            examples = [class_pair(pair) for pair in pairs[:3]]
            found.append(
                {
                    "between": [one, other],
                    "classes": len(pairs),
                    "examples": examples,
                    "texts": texts,
                }
            )
    return found


def _parts(splits: Splits) -> list[Corpus]:
    return [splits.train, splits.validation, splits.test]


def _domains(splits: Splits) -> list[str]:
    return list(dict.fromkeys(name for corpus in _parts(splits) for name in corpus.domains))

"""The sources of --data: their weights, and the description of them that a run prints and keeps.

A source is a file or a folder, see `rnnopt.data.splits.read_splits`.
"""

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
    """Split each ``PATH=WEIGHT`` into a path and a weight.

    Args:
        data: the values of --data. A value that exists as a file or folder is a path as a whole.

    Returns:
        The paths, and path -> weight for those that have one.

    Raises:
        InputError: a weight is not a positive, finite number.
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
    """Weights of domains, by which sources are drawn in proportion to the weights of sources.

    The domains of a source share its weight equally. A source without a weight has weight 1.

    Args:
        splits: read from sources.
        weights: path of a source -> its weight.

    Returns:
        Domain -> weight. Empty if no weight is given, so that all domains are drawn equally often.
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
    """Describe the sources and their overlaps, in a form that JSON can hold.

    Args:
        splits: from `rnnopt.data.splits.read_splits`.

    Returns:
        ``"sources"``: a list of ``{"source", "domains", "weight", "duplicates", "classes": {part:
        count}, "texts": {part: count}, "fingerprints": {part: 16 hex digits}}``. ``"overlaps"``: a
        list of ``{"between": [name, name], "classes": count, "examples", "texts": count}`` for each
        two sources that overlap. ``"unsafe"``: the same for each two of train, validation and test;
        their classes overlap only with --allow-overlap.
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
    """One line for each overlap of two sources, and a caution for each overlap of two parts.

    Args:
        description: from `describe`.
    """
    lines = [_shared(overlap) for overlap in description["overlaps"]]
    return lines + [
        f"CAUTION: {_shared(overlap)}, which --allow-overlap accepts"
        for overlap in description["unsafe"]
        if overlap["classes"]
    ]


def _shared(overlap: Mapping[str, Any]) -> str:
    one, other = overlap["between"]
    examples = f" ({listed(overlap['examples'], most=3)})" if overlap["classes"] else ""
    counts = f"classes {overlap['classes']}{examples}, texts {overlap['texts']}"
    return f"{one} and {other} overlap: {counts}"


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

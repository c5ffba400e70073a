"""Whether a rule was meta-trained on what it is now to be transferred to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rnnopt.data.corpus import Corpus, class_name, listed
from rnnopt.data.splits import class_pair, overlapping_classes, source_files
from rnnopt.errors import InputError


def seen_in(training: Mapping[str, Any]) -> dict[str, Any]:
    """The classes that a rule file, or an init folder, says it was made with, and sketches of each.

    Args:
        training: what it says of its meta-training.
    """
    return {**training.get("classes", {}), **training.get("validation_classes", {})}


def seen_domains(training: Mapping[str, Any], corpus: Corpus) -> list[str]:
    """Domains of the corpus that meta-training drew tasks from, sorted.

    Args:
        training: what a rule file says of its meta-training.
        corpus: what the rule is transferred to.
    """
    names = seen_in(training)
    return sorted(
        domain
        for domain in set(corpus.domains)
        if any(name.startswith(class_name((domain, ""))) for name in names)
    )


def require_transfer(
    training: Mapping[str, Any], corpus: Corpus, path: str, allow_overlap: bool
) -> dict[str, list[str]]:
    """Refuse to adapt to texts of a domain, or of classes, that meta-training has seen.

    Args:
        training: as in `seen_domains`.
        corpus: the user's texts.
        path: their file; it, or the folder of a file called train, val or test, names the domain.
        allow_overlap: return what was seen rather than raise.

    Returns:
        ``{"domains": [...], "classes": [...]}``, both empty if all is well.

    Raises:
        InputError: something was seen.
    """
    domain = source_files(Path(os.path.abspath(path)))[1]
    here = replace(corpus, domains=(domain,) * len(corpus))
    known = seen_in(training)
    seen = {
        "domains": seen_domains(training, here),
        "classes": [class_pair(pair) for pair in overlapping_classes(known, here)],
    }
    if allow_overlap or not any(seen.values()):
        return seen
    what = f"the domain {domain!r}" if seen["domains"] else "classes"
    examples = f" ({listed(seen['classes'], most=3)})" if seen["classes"] else ""
    raise InputError(
        f"{path}: meta-training, of the rule or the initial values, has seen {what}{examples}, so "
        "that no figure would show transfer; use other texts, another --rule or --init, or accept "
        "that with --allow-overlap"
    )


def seen_lines(seen: Mapping[str, Any]) -> list[str]:
    """What a report says at its top of what the rule has seen.

    Args:
        seen: from `require_transfer`, or the like.
    """
    lines = []
    if seen.get("domains"):
        lines.append(f"meta-training has seen the domain {listed(seen['domains'], most=3)}")
    if seen.get("classes"):
        lines.append(
            f"meta-training has seen {len(seen['classes'])} of the classes that are judged by: "
            f"{listed(seen['classes'], most=3)}"
        )
    return lines

"""Classes and domains that a rule, or its initial values, saw in meta-training.

Figures on such classes do not measure transfer to new tasks. A rule file, and a folder of initial
values, list their classes with a sketch of each (`rnnopt.data.splits.class_sketches`), so that a
user's classes can be compared with them by name and by text.
"""

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
    """The classes of meta-training, those of validation among them.

    Args:
        training: what a rule file or an init folder says of its meta-training.

    Returns:
        Class name -> its sketch.
    """
    return {**training.get("classes", {}), **training.get("validation_classes", {})}


def seen_domains(training: Mapping[str, Any], corpus: Corpus) -> list[str]:
    """The domains of the corpus that meta-training drew tasks from, sorted.

    Args:
        training: what a rule file or an init folder says of its meta-training.
        corpus: the texts to which the rule is transferred.
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
    """Check that meta-training saw neither the domain nor the classes of the user's texts.

    Args:
        training: as in `seen_domains`.
        corpus: the user's texts.
        path: their file. Its name is their domain. If the file is called train, val or test, the
            name of its folder is.
        allow_overlap: return what was seen instead of raising an error.

    Returns:
        ``{"domains": [...], "classes": [...]}``, both empty if nothing was seen.

    Raises:
        InputError: meta-training saw the domain or one of the classes.
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
    """Sentences for the top of a report that tell which domains and classes were seen.

    Args:
        seen: from `require_transfer`.
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

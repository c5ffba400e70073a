"""A corpus that every machine has: the docstrings of the Python standard library."""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from rnnopt.data.corpus import Corpus, text_key
from rnnopt.data.splits import Splits, divide_classes
from rnnopt.errors import InputError

STDLIB_LEAST_WORDS = 5
STDLIB_LEAST_TEXTS = 20
# Folders inside the library's that do not belong to it, and tests, whose docstrings describe bugs
# and not modules.
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@functools.cache
def stdlib_corpus() -> Corpus:
    """Docstrings of this Python's standard library, labelled by their module.

    A text is the first paragraph of a docstring, if it has at least 5 words. Its label is the
    top-level module or package; labels with fewer than 20 texts are left out. A text that occurs
    in several modules is left out too, since it tells none of them from the others. The sources are
    parsed and not imported.

    Raises:
        InputError: this Python was installed without its sources.
    """
    found: dict[str, tuple[str, set[str]]] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in _stdlib_sources(root):
        label = path.relative_to(root).parts[0].removesuffix(".py")
        for text in _first_paragraphs(path):
            found.setdefault(text_key(text), (text, set()))[1].add(label)
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for text, labels in found.values():
        if len(labels) == 1:
            texts[min(labels)].append(text)
    rows = [
        (text, label)
        for label in sorted(texts)
        if len(texts[label]) >= STDLIB_LEAST_TEXTS
        for text in sorted(texts[label])
    ]
    if not rows:
        raise InputError(
            f"{root}: no sources of Python's standard library; "
            "use a Python that has them, or a corpus of your own"
        )
    return Corpus(
        tuple(text for text, _ in rows), tuple(label for _, label in rows), ("stdlib",) * len(rows)
    )


def stdlib_splits(seed: int = 0) -> Splits:
    """The modules of `stdlib_corpus`, divided into train, validation and test."""
    return divide_classes(stdlib_corpus(), seed, what="the standard library")


def _stdlib_sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_SKIPPED)
        if Path(folder) == root:
            # Some systems install other packages in this folder too.
            folders[:] = [name for name in folders if name in sys.stdlib_module_names]
            files = [name for name in files if name.removesuffix(".py") in sys.stdlib_module_names]
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _first_paragraphs(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some sources have invalid escapes
            pending: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # a template or a broken file, which has no docstrings
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            words = re.split(r"\n\s*\n", docstring.strip())[0].split()
            if len(words) >= STDLIB_LEAST_WORDS:
                yield " ".join(words)
        # Only statements contain definitions. To skip expressions saves nine tenths of the tree.
        pending += [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.ExceptHandler)
        ]

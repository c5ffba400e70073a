"""Whose classes a comparison tunes baselines by, and whose it judges by."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rnnopt.cli.options import EMBEDDED, episode_sampler, read_data
from rnnopt.data.corpus import Corpus, merge
from rnnopt.data.embedded import stdlib_corpus, stdlib_splits
from rnnopt.data.files import read_corpus
from rnnopt.data.splits import Splits, check_disjoint, read_splits, source_files
from rnnopt.errors import InputError
from rnnopt.tasks.episodes import EpisodeSampler


def comparison_data(options: Namespace) -> Splits:
    """Validation classes to tune by, and as the test part the classes to judge by.

    Which those are is said by --data, --report-on and --tuning-data. With the latter, train is
    empty: nothing in a comparison reads it.

    Raises:
        InputError: as `read_splits`; validation or all classes to judge by and no --tuning-data; a
            class on both sides.
    """
    if options.tuning_data is None:
        if options.report_on != "test":
            raise InputError(
                f"--report-on {options.report_on}: then its validation classes can't tune the "
                "baselines; name other data for that with --tuning-data"
            )
        return read_data(options)
    if options.report_on == "all":
        report = _all_classes(options)
    else:
        splits = read_data(options)
        report = splits.test if options.report_on == "test" else splits.validation
    tuning = _tuning_classes(options)
    check_disjoint(tuning, report, "--tuning-data and --data", options.allow_overlap)
    return Splits(Corpus((), (), ()), tuning, report)


def comparison_sampler(options: Namespace, corpus: Corpus) -> EpisodeSampler:
    """`rnnopt.cli.options.episode_sampler`; with --fewer-ways, of as many ways as there are classes."""
    if not options.fewer_ways:
        return episode_sampler(options, corpus)
    least = episode_sampler(Namespace(**{**vars(options), "ways": 2}), corpus)
    most = max(len(classes) for classes in least.eligible_classes(options.shots).values())
    return episode_sampler(Namespace(**{**vars(options), "ways": min(options.ways, most)}), corpus)


def _tuning_classes(options: Namespace) -> Corpus:
    if options.tuning_data == [EMBEDDED]:
        return stdlib_splits(options.seed).validation
    return read_splits(
        options.tuning_data,
        seed=options.seed,
        text_column=options.text_column,
        label_column=options.label_column,
        allow_overlap=options.allow_overlap,
    ).validation


def _all_classes(options: Namespace) -> Corpus:
    if options.data == [EMBEDDED]:
        return stdlib_corpus()
    return merge(
        [
            read_corpus(
                file,
                text_column=options.text_column,
                label_column=options.label_column,
                domain_column=options.domain_column,
                domain=domain,
            )
            for files, domain in map(source_files, map(Path, options.data))
            for file in files.values()
        ]
    )

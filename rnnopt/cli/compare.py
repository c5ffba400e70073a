"""`rnnopt compare`: a rule against baselines; whose classes tune them, and whose are judged by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rnnopt.cli.progress import progress_bar, waiting
from rnnopt.cli.settings.commands import Compare
from rnnopt.cli.settings.files import SETTINGS_FILE, chosen, write_settings
from rnnopt.cli.settings.loading import (
    EMBEDDED,
    choose_device,
    choose_rule,
    choose_start,
    episode_sampler,
    known_to,
    load_classifier,
    read_data,
    require_at_least,
)
from rnnopt.data.corpus import Corpus, merge
from rnnopt.data.embedded import stdlib_corpus, stdlib_splits
from rnnopt.data.files import read_corpus
from rnnopt.data.overlap import seen_domains, seen_in
from rnnopt.data.splits import (
    Splits,
    check_disjoint,
    overlapping_classes,
    read_splits,
    source_files,
)
from rnnopt.errors import InputError
from rnnopt.evaluation.comparison import Comparison, default_budgets
from rnnopt.evaluation.journal import Journal
from rnnopt.evaluation.report.plot import plot_comparison
from rnnopt.evaluation.report.report import write_report
from rnnopt.evaluation.report.tables import comparison_table, show
from rnnopt.rules.files import SavedRule, rule_fingerprint
from rnnopt.storage.files import fingerprint, write_atomically
from rnnopt.storage.provenance import versions
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import encoder_name
from rnnopt.tasks.text.frozen import DIRECT
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import TextTasks


def run(settings: Compare) -> None:
    """Compare, or go on with a comparison; write the figures, and print the table."""
    require_at_least(2, settings, "episodes")  # one has no interval
    require_at_least(1, settings, "tuning_episodes", "tuned_steps")
    default_budgets(settings.steps)  # refuses no steps before anything is read
    with waiting("reading data and encoder"):
        device = choose_device(settings.device)
        _, rule = choose_rule(settings.rule, device)
        splits = comparison_data(settings)
        known = known_to(settings)
        overlap = _overlap(settings, known, splits.test)
        samplers = [comparison_sampler(settings, part) for part in (splits.validation, splits.test)]
        classifier = load_classifier(settings, settings.ways, device, settings.kind)
        start = choose_start(settings, classifier)
    out = Path(settings.json)
    facts = _facts(settings, splits, classifier, start) | _fewer_ways(settings, samplers)
    journal = Journal(out.with_name(out.name + ".runs"), facts)
    write_settings(out.with_name(f"{out.name}.{SETTINGS_FILE}"), settings)
    tasks = [TextTasks(sampler, classifier) for sampler in samplers]
    setting = {
        **facts,
        "rule": rule_fingerprint(rule),
        "seen_classes": overlap,
        "seen_domains": sorted({d for facts in known for d in seen_domains(facts, splits.test)}),
        "versions": versions(),
    }
    result = {"setting": setting, **_compare(settings, rule, tasks, journal, start)}
    write_atomically(out, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    _tell(settings, result)
    print(f"report: {write_report(out)}")


def _compare(
    settings: Compare,
    rule: SavedRule,
    tasks: Sequence[TextTasks],
    journal: Journal,
    start: TextStart,
) -> dict[str, Any]:
    """Run what the journal does not know yet; the figures."""
    tuning, report = tasks
    with progress_bar("run") as bar:
        comparison = Comparison(
            report.classifier,
            rule,
            rule_fingerprint(rule),
            tuning,
            report,
            default_budgets(settings.steps),
            [name.strip() for name in settings.baselines.split(",") if name.strip()],
            journal,
            start=start,
            # the plan shrinks as tuned baselines turn out to need fewer runs
            tick=lambda name: bar.advance(comparison.planned),
            direct=DIRECT,
            tuned_budgets=default_budgets(settings.tuned_steps or settings.steps),
        )
        return comparison.run(settings.episodes, settings.tuning_episodes)


def _tell(settings: Compare, result: dict[str, Any]) -> None:
    """Draw the picture that --plot asks for, and print the table and its cautions."""
    setting = result["setting"]
    if settings.plot:
        title = (
            f"{settings.ways}-way {settings.shots}-shot, unseen classes, {setting['encoder']}, "
            f"{settings.tune}, {settings.episodes} episodes"
        )
        plot_comparison(result, title, Path(settings.plot))
    if overlap := setting["seen_classes"]:
        print(f"CAUTION: {len(overlap)} test classes were seen in meta-training: {overlap[:3]}")
    if "ways_used" in setting:
        print(f"fewer classes than ways, so {setting['ways_used']}")
    show(comparison_table(result))


def _overlap(
    settings: Compare, known: Sequence[Mapping[str, Any]], test: Corpus
) -> list[tuple[str, str]]:
    """Test classes that the rule or the initial values were meta-trained on, each once."""
    found = (pair for facts in known for pair in _seen_classes(facts, test, settings.allow_overlap))
    return list(dict.fromkeys(found))


def comparison_data(settings: Compare) -> Splits:
    """Validation classes to tune by, and as the test part the classes to judge by.

    Which those are is said by --data, --report-on and --tuning-data. With the latter, train is
    empty: nothing in a comparison reads it.

    Raises:
        InputError: as `read_splits`; validation or all classes to judge by and no --tuning-data; a
            class on both sides.
    """
    if settings.tuning_data is None:
        if settings.report_on != "test":
            raise InputError(
                f"--report-on {settings.report_on}: then its validation classes can't tune the "
                "baselines; name other data for that with --tuning-data"
            )
        return read_data(settings)
    if settings.report_on == "all":
        report = _all_classes(settings)
    else:
        splits = read_data(settings)
        report = splits.test if settings.report_on == "test" else splits.validation
    tuning = _tuning_classes(settings, settings.tuning_data)
    check_disjoint(tuning, report, "--tuning-data and --data", settings.allow_overlap)
    return Splits(Corpus((), (), ()), tuning, report)


def comparison_sampler(settings: Compare, corpus: Corpus) -> EpisodeSampler:
    """The episodes of one side; with --fewer-ways, of as many ways as there are classes."""
    if not settings.fewer_ways:
        return episode_sampler(settings, corpus)
    least = episode_sampler(settings, corpus, ways=2)
    most = max(len(classes) for classes in least.eligible_classes(settings.shots).values())
    return episode_sampler(settings, corpus, ways=min(settings.ways, most))


def _tuning_classes(settings: Compare, paths: list[str]) -> Corpus:
    if paths == [EMBEDDED]:
        return stdlib_splits(settings.seed).validation
    return read_splits(
        paths,
        seed=settings.seed,
        text_column=settings.text_column,
        label_column=settings.label_column,
        allow_overlap=settings.allow_overlap,
    ).validation


def _all_classes(settings: Compare) -> Corpus:
    if settings.data == [EMBEDDED]:
        return stdlib_corpus()
    return merge(
        [
            read_corpus(
                file,
                text_column=settings.text_column,
                label_column=settings.label_column,
                domain_column=settings.domain_column,
                domain=domain,
            )
            for files, domain in map(source_files, map(Path, settings.data))
            for file in files.values()
        ]
    )


def _fewer_ways(settings: Compare, samplers: Sequence[EpisodeSampler]) -> dict[str, Any]:
    """A fact where --fewer-ways did something."""
    used = {name: max(sampler.ways) for name, sampler in zip(("tuning", "report"), samplers)}
    return {"ways_used": used} if set(used.values()) != {settings.ways} else {}


def _facts(
    settings: Compare, splits: Splits, classifier: Classifier, start: TextStart
) -> dict[str, Any]:
    """All that a run of a comparison depends on, beside method, rate and task number."""
    return {
        "encoder": encoder_name(settings.encoder),
        "encoder_weights": classifier.fingerprint,
        "device": classifier.device.type,
        "precision": classifier.precision,
        "init": None if start.values is None else fingerprint(start.values),
        "head": start.head,
        "adapted": start.adapted,
        "data": [splits.validation.fingerprint(), splits.test.fingerprint()],
        **chosen(
            settings, "ways", "shots", "queries", "steps", "tune", "lora_rank", "top_layers",
            "pooling", "max_length", "seed",
        ),
    }  # fmt: skip


def _seen_classes(
    training: Mapping[str, Any], test: Corpus, allow_overlap: bool
) -> list[tuple[str, str]]:
    """Test classes that the rule was meta-trained on, by name or by their texts."""
    pairs = overlapping_classes(seen_in(training), test)
    if pairs and not allow_overlap:
        raise InputError(
            f"{len(pairs)} classes that meta-training, of the rule or the initial values, has seen "
            f"would be judged by, such as {pairs[0][1]!r}, its {pairs[0][0]!r}; judge by other "
            "classes, or accept that with --allow-overlap"
        )
    return pairs

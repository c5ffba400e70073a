"""What the commands of `rnnopt.cli.main` do: options in, files and a few printed lines out."""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rnnopt.cli.held_out import comparison_data, comparison_sampler
from rnnopt.cli.options import (
    choose_device,
    choose_rule,
    choose_start,
    episode_sampler,
    load_classifier,
    load_kinds,
    own_device,
    read_data,
    require_at_least,
    require_one_kind,
)
from rnnopt.cli.until import (
    Watch,
    adapt_requirement,
    data_facts,
    judge_unseen,
    judged_facts,
    judgement_line,
    user_texts,
)
from rnnopt.data.corpus import Corpus, listed, summary
from rnnopt.data.overlap import require_transfer, seen_domains, seen_in
from rnnopt.data.sources import describe, overlap_lines
from rnnopt.data.splits import (
    Splits,
    class_pair,
    class_sketches,
    overlapping_classes,
)
from rnnopt.errors import InputError
from rnnopt.evaluation.comparison import Comparison, default_budgets
from rnnopt.evaluation.journal import Journal
from rnnopt.evaluation.report.plot import plot_comparison
from rnnopt.evaluation.report.report import ADAPT_FILE, write_report
from rnnopt.evaluation.report.tables import comparison_table, confusion_text, sources_table
from rnnopt.meta.processes import Team
from rnnopt.meta.settings import LearnedSettings, MetaTrainSettings, UnrollSettings
from rnnopt.meta.training import MetaTraining, finite_or_none
from rnnopt.rules.files import RULE_FILE, SHIPPED_RULE, read_training, rule_fingerprint
from rnnopt.storage.files import claim_folder, write_atomically
from rnnopt.storage.provenance import versions, write_provenance
from rnnopt.storage.run_folder import INIT_FOLDER
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.requirement import NOT_MET
from rnnopt.tasks.text.adapt import fit, in_batches, judge_texts, label_numbers
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import encoder_name
from rnnopt.tasks.text.frozen import DIRECT
from rnnopt.tasks.text.init_folder import fingerprint, read_init_training
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import TextTask, TextTasks


def meta_train(options: Namespace) -> int:
    """`rnnopt meta-train`; where torchrun started several processes, one of them.

    Returns:
        The exit code: 0, or `NOT_MET`.
    """
    with Team.join() as team:
        settings, train, validation, splits = team.together(lambda: _parts(options, team))
        run = _run(options, settings, train, validation, team)
        if team.rank > 0:
            run.run()
            # torchrun would end the first process, which still writes, where another one fails
            return 0
        data = describe(splits)
        write_provenance(run.folder.path, options, data, run.progress.meta_step)
        print("\n".join([sources_table(data), *overlap_lines(data)]))
        _watch(run)
    return NOT_MET if settings.until is not None and not run.met else 0


def _parts(
    options: Namespace, team: Team
) -> tuple[MetaTrainSettings, TextTasks, TextTasks, Splits]:
    """What a process of meta-training reads on its own: training and validation tasks."""
    settings = _settings(options)
    splits = read_data(options, weighted=True)
    samplers = [
        episode_sampler(options, part, splits.weights) for part in (splits.train, splits.validation)
    ]
    device = choose_device(options.device)
    if team.size > 1 and device.type == "cuda":
        device = own_device(team.local_rank)
    classifiers = load_kinds(options, device)
    if options.init != "pretrained":
        require_one_kind(classifiers)
    train = TextTasks(samplers[0], classifiers, options.batch_size)
    return settings, train, TextTasks(samplers[1], classifiers), splits


def _run(
    options: Namespace,
    settings: MetaTrainSettings,
    train: TextTasks,
    validation: TextTasks,
    team: Team,
) -> MetaTraining:
    """The run that the options of `meta-train` describe."""
    corpora = train.sampler.corpus, validation.sampler.corpus
    task_facts = {
        "encoder": encoder_name(options.encoder),
        "encoder_weights": train.classifier.fingerprint,
        "precision": train.classifier.precision,
        "domain_weights": train.sampler.domain_weights or None,
        **{
            name: getattr(options, name)
            for name in (
                "ways", "shots", "queries", "most_support", "tune", "lora_rank", "top_layers",
                "pooling", "max_length", "batch_size",
            )
        },
    }  # fmt: skip
    return MetaTraining(
        train,
        validation,
        settings,
        Path(options.output),
        facts={
            **task_facts,
            "train": corpora[0].fingerprint(),
            "validation": corpora[1].fingerprint(),
        },
        training={
            **task_facts,
            "settings": asdict(settings),
            "classes": {
                **_seen_before(options, settings.learned, train.classifier, corpora[1]),
                **class_sketches(corpora[0]),
            },
            "validation_classes": class_sketches(corpora[1]),
        },
        resume=options.resume,
        team=team,
    )


def _seen_before(
    options: Namespace, settings: LearnedSettings, classifier: Classifier, validation: Corpus
) -> dict[str, Any]:
    """The classes that the rule of --from was made with, none of which may choose the new one."""
    origin = settings.origin_path(classifier)
    if origin is None:
        return {}
    facts = read_training(origin)
    found = overlapping_classes(facts.get("classes", {}), validation)
    if found and not options.allow_overlap:
        raise InputError(
            f"--from {options.origin}: was meta-trained on {len(found)} of the validation classes "
            f"({listed(map(class_pair, found), most=3)}), which are to choose the new rule; use "
            "other data, or accept that with --allow-overlap"
        )
    return seen_in(facts)


def _watch(run: MetaTraining) -> None:
    """Run, showing how it goes, and draw the picture."""
    folder, settings = run.folder.path, run.settings
    with tqdm(total=settings.meta_steps, initial=run.progress.meta_step, unit="meta-step") as bar:

        def report(record: dict[str, Any]) -> None:
            bar.update(record["meta_step"] - bar.n)
            if record.get("meta_loss") is not None:
                bar.set_postfix_str(f"meta-loss {record['meta_loss']:.3f}")
            if "validation" in record:
                bar.write(_validation_line(record) + _decision(record, settings))

        if run.met and settings.requirement is not None:  # a resumed run may have nothing to do
            words = settings.requirement.words(run.progress.figures)
            bar.write(f"meta-step {run.progress.meta_step}: {words}, stop")
        run.run(report)
    print(f"report: {write_report(folder)}")
    if run.progress.skipped:
        print(f"skipped, since something was not finite: {run.progress.skipped} meta-steps")
    print(f"best rule, of meta-step {run.progress.best_step}: {folder / RULE_FILE}")
    if run.learned.init is not None:
        print(f"the initial values that go with it: {folder / INIT_FOLDER}")


def _settings(options: Namespace) -> MetaTrainSettings:
    """What the options of `meta-train` say, but for data and classifier."""
    return MetaTrainSettings(
        meta_steps=options.meta_steps,
        unroll=UnrollSettings(
            steps=options.steps,
            order=options.order,
            truncation=options.truncation,
            coordinates=options.coordinates,
            query_weight=options.query_weight,
            support_weight=options.support_weight,
            step_weights=options.step_weights,
        ),
        shortest=options.shortest,
        tasks_per_meta_step=options.tasks,
        meta_lr=options.meta_lr,
        clip=options.clip,
        judged=options.judged,
        loss_scale=options.loss_scale,
        calibrated=options.calibrated,
        sure_from=options.sure_from,
        exact=tuple(options.exact),
        hidden_size=options.hidden_size,
        learned=LearnedSettings(
            inner=options.inner,
            inner_lr=options.inner_lr,
            learn=options.learn,
            origin=options.origin,
            init=options.init,
            init_lr=options.init_lr,
            init_penalty=options.init_penalty,
            start=TextStart(options.adapt_only or "all", head=options.head or "random"),
        ),
        seed=options.seed,
        validate_every=options.validate_every,
        validation_tasks=options.validation_tasks,
        checkpoint_every=options.checkpoint_every,
        until=options.until,
    )


def _validation_line(record: dict[str, Any]) -> str:
    check = record["validation"]
    return (
        f"meta-step {record['meta_step']}: validation meta-loss {check['score']:.3f} over all "
        f"steps, loss {check['loss'][-1]:.3f} after the last; accuracy "
        f"{check['accuracy'][0]:.3f} after one step, {check['accuracy'][-1]:.3f} after the last"
    )


def _decision(record: dict[str, Any], settings: MetaTrainSettings) -> str:
    """What a validation means for --until, to stand behind its line."""
    if settings.requirement is None:
        return ""
    last = record["meta_step"] == settings.meta_steps
    what = "stop" if record["validation"]["met"] else "out of meta-steps" if last else "go on"
    return f"\n  {settings.requirement.words(record['validation'])}, {what}"


def adapt(options: Namespace) -> int:
    """`rnnopt adapt`.

    Returns:
        The exit code: 0, or `NOT_MET`.
    """
    requirement = adapt_requirement(options)
    require_at_least(1, options, "steps", "batch_size", "validate_every")
    if not 0 < options.lr < math.inf:
        raise InputError(f"--lr {options.lr}: must be positive and finite; 1 is as meta-trained")
    train, test = user_texts(options)
    names, train_labels, test_labels = label_numbers(train, test)
    classes = {name: sketch for facts in _known(options) for name, sketch in seen_in(facts).items()}
    seen = require_transfer({"classes": classes}, train, options.data, options.allow_overlap)
    classifier = load_classifier(options, len(names), choose_device(options.device))
    start = choose_start(options, classifier)
    rule_file, rule = choose_rule(options, start.params(classifier).values())
    support = in_batches(classifier, train.texts, train_labels)
    task = TextTask(classifier, (support,), support, len(names))
    start.begin(classifier, task, options.seed)
    optimizer = start.optimizer(classifier, rule, lr=options.lr)
    folder = Path(options.output)
    claim_folder(folder)
    print(f"training: {summary(train)}\nheld out: {summary(test)}")
    if (most := options.steps * options.batch_size) < len(train):
        print(f"at most {most} of the {len(train)} training texts will be seen; raise --steps")
    started = time.perf_counter()
    with tqdm(total=options.steps, unit="step") as bar:
        watch = None
        if requirement is not None:
            watch = Watch(
                classifier, test, test_labels, requirement, options.validate_every, options.steps,
                bar.write,
            )  # fmt: skip

        def tick(loss: float) -> bool:
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}")
            return watch is not None and watch()

        losses = fit(
            classifier,
            optimizer,
            train.texts,
            train_labels,
            steps=options.steps,
            batch_size=options.batch_size,
            seed=options.seed,
            tick=tick,
        )
    seconds = time.perf_counter() - started
    if watch is not None:
        watch.restore()
    judged = judge_texts(classifier, test.texts, test_labels)
    if optimizer.undone:
        print(
            f"{optimizer.undone} steps were undone, since they made the loss climb; Adam went on "
            "in the rule's place"
        )
    print("loss before each step: " + " ".join(f"{loss:.3f}" for loss in losses))
    print(judgement_line(judged, "held out"))
    classifier.save(folder, names)
    report = {
        **judged_facts(judged, names),
        "steps": len(losses),
        "seconds": round(seconds, 2),
        "losses": finite_or_none(losses),
        "undone": optimizer.undone,
        "seen": seen,
    }
    data = {
        "training": data_facts(train),
        "held out": data_facts(test),
        "rule": f"{rule_file}, {rule_fingerprint(rule)}",
        "encoder": f"{encoder_name(options.encoder)}, {classifier.fingerprint}",
    }
    if watch is not None:
        report["requirement"] = watch.report()
        print(confusion_text(names, judged.matrix))
        if options.test:
            # whatever may be wrong with this file, what was learned is safe, and told of
            _write_adaptation(folder, report, options, data)
            try:
                report["test"], data["test"] = judge_unseen(options, classifier, train, test)
            except InputError as error:
                raise InputError(
                    f"{error}; the classifier is saved in {folder}, and its report beside it"
                ) from error
    print(f"report: {_write_adaptation(folder, report, options, data)}")
    print(f'load it with transformers.pipeline("text-classification", "{folder}")')
    return NOT_MET if watch is not None and watch.met_step is None else 0


def _known(options: Namespace) -> list[dict[str, Any]]:
    """What the files of the rule and of the initial values say of their meta-training.

    Both rules that ship have seen the same.
    """
    known = [read_training(options.rule or SHIPPED_RULE)]
    return known + ([read_init_training(options.init)] if options.init else [])


def _write_adaptation(
    folder: Path, report: dict[str, Any], options: Namespace, data: dict[str, Any]
) -> Path:
    """What adaptation found, into its folder; the report's path."""
    write_atomically(folder / ADAPT_FILE, _json(report))
    write_provenance(folder, options, data)
    return write_report(folder)


def compare(options: Namespace) -> None:
    """`rnnopt compare`."""
    require_at_least(2, options, "episodes")  # one has no interval
    require_at_least(1, options, "tuning_episodes")
    budgets = default_budgets(options.steps)
    if options.tuned_steps is not None:
        require_at_least(1, options, "tuned_steps")
    tuned_budgets = default_budgets(options.tuned_steps or options.steps)
    splits = comparison_data(options)
    known = _known(options)
    overlap = list(
        dict.fromkeys(
            pair
            for facts in known
            for pair in _seen_classes(facts, splits.test, options.allow_overlap)
        )
    )
    samplers = [comparison_sampler(options, part) for part in (splits.validation, splits.test)]
    classifier = load_classifier(options, options.ways, choose_device(options.device))
    start = choose_start(options, classifier)
    _, rule = choose_rule(options, start.params(classifier).values())
    tuning, report = (TextTasks(sampler, classifier) for sampler in samplers)
    out = Path(options.json)
    facts = _facts(options, splits, classifier, start) | _fewer_ways(options, samplers)
    journal = Journal(out.with_name(out.name + ".runs"), facts)
    baselines = [name.strip() for name in options.baselines.split(",") if name.strip()]
    with tqdm(unit="run") as bar:
        comparison = Comparison(
            classifier,
            rule,
            rule_fingerprint(rule),
            tuning,
            report,
            budgets,
            baselines,
            journal,
            start=start,
            tick=lambda name: _tick(bar, comparison.planned),
            tuned_budgets=tuned_budgets,
            direct=DIRECT,
        )
        result = comparison.run(options.episodes, options.tuning_episodes)
    setting = {
        **facts,
        "rule": rule_fingerprint(rule),
        "seen_classes": overlap,
        "seen_domains": sorted({d for facts in known for d in seen_domains(facts, splits.test)}),
        "versions": versions(),
    }
    result = {"setting": setting, **result}
    write_atomically(out, _json(result))
    if options.plot:
        title = (
            f"{options.ways}-way {options.shots}-shot, unseen classes, {facts['encoder']}, "
            f"{options.tune}, {options.episodes} episodes"
        )
        plot_comparison(result, title, Path(options.plot))
    if overlap:
        print(f"CAUTION: {len(overlap)} test classes were seen in meta-training: {overlap[:3]}")
    if "ways_used" in facts:
        print(f"fewer classes than ways, so {facts['ways_used']}")
    print(comparison_table(result))
    print(f"report: {write_report(out)}")


def _tick(bar: Any, planned: int) -> None:
    bar.total = planned  # it falls as tuned baselines turn out to need fewer runs
    bar.update()


def _fewer_ways(options: Namespace, samplers: Sequence[EpisodeSampler]) -> dict[str, Any]:
    """A fact where --fewer-ways did something."""
    used = {name: max(sampler.ways) for name, sampler in zip(("tuning", "report"), samplers)}
    return {"ways_used": used} if set(used.values()) != {options.ways} else {}


def _facts(
    options: Namespace, splits: Splits, classifier: Classifier, start: TextStart
) -> dict[str, Any]:
    """All that a run of a comparison depends on, beside method, rate and task number."""
    return {
        "encoder": encoder_name(options.encoder),
        "encoder_weights": classifier.fingerprint,
        "device": classifier.device.type,
        "precision": classifier.precision,
        "init": None if start.values is None else fingerprint(start.values),
        "head": start.head,
        "adapted": start.adapted,
        "data": [splits.validation.fingerprint(), splits.test.fingerprint()],
        **{
            name: getattr(options, name)
            for name in (
                "ways", "shots", "queries", "steps", "tune", "lora_rank", "top_layers", "pooling",
                "max_length", "seed",
            )
        },
    }  # fmt: skip


def _seen_classes(
    training: dict[str, Any], test: Corpus, allow_overlap: bool
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


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()

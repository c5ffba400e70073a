"""`rnnopt meta-train`: options in, the folder of a run and a few printed lines out."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rnnopt.cli.progress import progress_bar, waiting
from rnnopt.cli.settings.commands import MetaTrain
from rnnopt.cli.settings.files import SETTINGS_FILE, chosen, write_settings
from rnnopt.cli.settings.loading import (
    choose_device,
    episode_sampler,
    load_kinds,
    own_device,
    read_data,
    require_one_kind,
)
from rnnopt.data.corpus import Corpus, listed
from rnnopt.data.overlap import seen_in
from rnnopt.data.sources import describe, overlap_lines
from rnnopt.data.splits import Splits, class_pair, class_sketches, overlapping_classes
from rnnopt.errors import InputError
from rnnopt.evaluation.report.report import write_report
from rnnopt.evaluation.report.tables import show, sources_table
from rnnopt.meta.processes import Team
from rnnopt.meta.settings import LearnedSettings, MetaTrainSettings, UnrollSettings
from rnnopt.meta.training import MetaTraining
from rnnopt.rules.files import RULE_FILE, read_training
from rnnopt.storage.provenance import write_provenance
from rnnopt.storage.run_folder import INIT_FOLDER
from rnnopt.tasks.requirement import NOT_MET
from rnnopt.tasks.text.encoder.loading import encoder_name
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import TextTasks


def run(settings: MetaTrain) -> int:
    """Meta-train; where torchrun started several processes, as one of them.

    Returns:
        The exit code: 0, or `NOT_MET`.
    """
    with Team.join(_end) as team:
        plan, train, validation, splits = team.together(lambda: _parts(settings, team))
        training = _training(settings, plan, train, validation, team)
        if team.rank > 0:
            training.run()
            # torchrun would end the first process, which still writes, where another one fails
            return 0
        folder, data = training.folder.path, describe(splits)
        write_settings(folder / SETTINGS_FILE, settings)
        write_provenance(
            folder, settings.command, vars(settings), data, training.progress.meta_step
        )
        show("\n".join([sources_table(data), *overlap_lines(data)]))
        _watch(training)
    return NOT_MET if settings.until is not None and not training.met else 0


def _end(message: str) -> None:
    """End this process, which waits for one that hangs; whatever it has written is whole."""
    if message:
        print(f"rnnopt meta-train: error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def _parts(
    settings: MetaTrain, team: Team
) -> tuple[MetaTrainSettings, TextTasks, TextTasks, Splits]:
    """What a process of meta-training reads on its own: training and validation tasks."""
    plan = _plan(settings)
    with waiting("reading data and encoder", team.rank == 0):
        splits = read_data(settings, weighted=True)
        samplers = [
            episode_sampler(settings, part, splits.weights)
            for part in (splits.train, splits.validation)
        ]
        device = choose_device(settings.device)
        if team.size > 1 and device.type == "cuda":
            device = own_device(team.local_rank)
        classifiers = load_kinds(settings, device)
    if settings.init != "pretrained":
        require_one_kind(classifiers)
    train = TextTasks(samplers[0], classifiers, settings.batch_size)
    return plan, train, TextTasks(samplers[1], classifiers), splits


def _plan(settings: MetaTrain) -> MetaTrainSettings:
    """What the settings say, but for data and classifier."""
    return MetaTrainSettings(
        meta_steps=settings.meta_steps,
        unroll=UnrollSettings(
            **chosen(
                settings, "steps", "order", "truncation", "query_weight",
                "support_weight", "step_weights",
            )
        ),
        tasks_per_meta_step=settings.tasks,
        query_share=settings.query_share,
        calibrated_share=settings.calibrated_share,
        confidence_from=settings.confidence_from,
        second_order_for=tuple(settings.exact),
        learned=LearnedSettings(
            **chosen(
                settings, "inner", "inner_lr", "origin", "init", "init_lr", "init_penalty"
            ),
            start=TextStart(settings.adapt_only or "all", head=settings.head or "random"),
        ),
        **chosen(
            settings, "shortest", "meta_lr", "clip", "loss_scale", "hidden_size", "seed",
            "validate_every", "validation_tasks", "checkpoint_every", "until",
        ),
    )  # fmt: skip


def _training(
    settings: MetaTrain,
    plan: MetaTrainSettings,
    train: TextTasks,
    validation: TextTasks,
    team: Team,
) -> MetaTraining:
    """The run that the settings describe."""
    corpora = train.sampler.corpus, validation.sampler.corpus
    task_facts = {
        "encoder": encoder_name(settings.encoder),
        "encoder_weights": train.classifier.fingerprint,
        "precision": train.classifier.precision,
        "domain_weights": train.sampler.domain_weights or None,
        **chosen(
            settings, "ways", "shots", "queries", "most_support", "tune", "lora_rank",
            "top_layers", "pooling", "max_length", "batch_size",
        ),
    }  # fmt: skip
    return MetaTraining(
        train,
        validation,
        plan,
        Path(settings.output),
        facts={
            **task_facts,
            "train": corpora[0].fingerprint(),
            "validation": corpora[1].fingerprint(),
        },
        training={
            **task_facts,
            "settings": asdict(plan),
            "classes": {
                **_seen_before(settings, plan.learned, corpora[1]),
                **class_sketches(corpora[0]),
            },
            "validation_classes": class_sketches(corpora[1]),
        },
        resume=settings.resume,
        team=team,
    )


def _seen_before(
    settings: MetaTrain, learned: LearnedSettings, validation: Corpus
) -> dict[str, Any]:
    """The classes that the rule of --from was made with, none of which may choose the new one."""
    origin = learned.origin_path
    if origin is None:
        return {}
    facts = read_training(origin)
    found = overlapping_classes(facts.get("classes", {}), validation)
    if found and not settings.allow_overlap:
        raise InputError(
            f"--from {settings.origin}: was meta-trained on {len(found)} of the validation classes "
            f"({listed(map(class_pair, found), most=3)}), which are to choose the new rule; use "
            "other data, or accept that with --allow-overlap"
        )
    return seen_in(facts)


def _watch(training: MetaTraining) -> None:
    """Run, showing how it goes, and draw the picture."""
    folder, plan, progress = training.folder.path, training.settings, training.progress
    with progress_bar("meta-step", plan.meta_steps, progress.meta_step) as bar:

        def report(record: dict[str, Any]) -> None:
            loss = record.get("meta_loss")
            bar.at(record["meta_step"], note="" if loss is None else f"meta-loss {loss:.3f}")
            if "validation" in record:
                print(_validation_line(record) + _decision(record, plan))

        if training.met and plan.requirement is not None:  # a resumed run may have nothing to do
            words = plan.requirement.words(progress.figures)
            print(f"meta-step {progress.meta_step}: {words}, stop")
        training.run(report)
    print(f"report: {write_report(folder)}")
    if progress.skipped:
        print(f"skipped, since something was not finite: {progress.skipped} meta-steps")
    print(f"best rule, of meta-step {progress.best_step}: {folder / RULE_FILE}")
    if training.learned.init is not None:
        print(f"the initial values that go with it: {folder / INIT_FOLDER}")


def _validation_line(record: dict[str, Any]) -> str:
    check = record["validation"]
    return (
        f"meta-step {record['meta_step']}: validation meta-loss {check['score']:.3f} over all "
        f"steps, loss {check['loss'][-1]:.3f} after the last; accuracy "
        f"{check['accuracy'][0]:.3f} after one step, {check['accuracy'][-1]:.3f} after the last"
    )


def _decision(record: dict[str, Any], plan: MetaTrainSettings) -> str:
    """What a validation means for --until, to stand behind its line."""
    if plan.requirement is None:
        return ""
    last = record["meta_step"] == plan.meta_steps
    what = "stop" if record["validation"]["met"] else "out of meta-steps" if last else "go on"
    return f"\n  {plan.requirement.words(record['validation'])}, {what}"

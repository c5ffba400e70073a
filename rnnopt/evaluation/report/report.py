"""Reports of runs: `report.md` and its figures, written from the files in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rnnopt.data.overlap import seen_lines
from rnnopt.data.sources import overlap_lines
from rnnopt.data.splits import class_pair
from rnnopt.errors import InputError
from rnnopt.evaluation.report.tables import (
    NOT_FINITE,
    comparison_table,
    confusion_text,
    sources_table,
    table,
)
from rnnopt.storage.files import parse_json, write_atomically
from rnnopt.storage.provenance import PROVENANCE_FILE, read_json
from rnnopt.storage.run_folder import LOG_FILE, RUN_FILE
from rnnopt.tasks.requirement import Requirement

REPORT_FILE = "report.md"
ADAPT_FILE = "adapt.json"
_CHECKS_SHOWN = 30  # rows of a table of checks at most; the run's files hold all checks


def write_report(path: Path) -> Path:
    """Write the report of a run. An older report of the run is replaced.

    Args:
        path: the folder of `rnnopt meta-train` or `rnnopt adapt`, or the JSON file of `rnnopt
            compare`.

    Returns:
        The path of the report: ``report.md`` in the folder, or ``result.json.md`` beside a
        comparison's ``result.json``.

    Raises:
        InputError: there is no run at this path, or its files are damaged.
    """
    kinds: list[tuple[Path, Callable[[Path], list[str]]]] = [
        (path / RUN_FILE, _meta_training),
        (path / ADAPT_FILE, _adaptation),
    ]
    target = path / REPORT_FILE
    if path.is_file():
        kinds, target = [(path, _comparison)], path.with_name(path.name + ".md")
    for file, sections in kinds:
        if not file.is_file():
            continue
        try:
            text = "\n\n".join(sections(path)) + "\n"
        except (KeyError, TypeError, ValueError, IndexError, OSError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path}: its files are damaged, or another version's ({error!r}); make the run "
                "again, or restore them"
            ) from error
        write_atomically(target, text.encode())
        return target
    raise InputError(
        f"{path}: no run is there; name the folder of `rnnopt meta-train` ({RUN_FILE}) or `rnnopt "
        f"adapt` ({ADAPT_FILE}), or the JSON file of `rnnopt compare`"
    )


def _meta_training(folder: Path) -> list[str]:
    run, about = _read(folder / RUN_FILE), read_json(folder / PROVENANCE_FILE)
    lines = (folder / LOG_FILE).read_text().splitlines()
    records = [parse_json(line) for line in lines]
    checks = [record for record in records if "validation" in record]
    picture = _picture(lambda plot: plot.plot_learning(records, folder / "learning.png"))
    return [
        "# Meta-training",
        *_cautions(overlap_lines({**about["data"], "overlaps": []}) if about else []),
        _outcome(run, records, checks),
        *(["![meta-loss and validation loss](learning.png)"] if picture else []),
        "## Validation classes\n\n" + _validation_table(run, checks),
        *_data_section(about),
        *_settings_section(about),
        "## Identity of the run\n\nA run that resumes this one must have the same values.\n\n"
        + table(["fact", "value"], [[name, _shown(value)] for name, value in run.items()]),
    ]


def _outcome(
    run: Mapping[str, Any], records: Sequence[Mapping[str, Any]], checks: Sequence[Any]
) -> str:
    if not checks:
        return "No validation yet."
    last, done = checks[-1], records[-1]["meta_step"]
    best = min(checks, key=lambda record: record["validation"]["score"])
    score = f"meta-loss over all steps {best['validation']['score']:.3f}"
    told = f"{done} meta-steps; best on validation classes at {best['meta_step']}, {score}."
    if run.get("until") is None:
        return told
    requirement = Requirement.parse(
        run["until"], ("accuracy", "loss"), len(last["validation"]["loss"])
    )
    # Computed anew, since an earlier part of the run may have had another requirement, or none.
    met = requirement.met(last["validation"]) and last["meta_step"] == done
    verdict = (
        f"**Met at meta-step {done}**, whose rule is kept"
        if met
        else f"**Not met** within {done} of at most {run['meta_steps']} meta-steps"
    )
    return f"`{requirement}`: {verdict} ({requirement.words(last['validation'])}). {told}"


def _validation_table(run: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> str:
    steps = len(checks[-1]["validation"]["loss"]) if checks else 1
    budgets = sorted({1, (steps + 1) // 2, steps})
    header = ["meta-step", "meta-loss over all steps"]
    header += [f"{metric}@{b}" for metric in ("loss", "accuracy") for b in budgets]
    requirement = None
    if run.get("until") is not None:
        requirement = Requirement.parse(run["until"], ("accuracy", "loss"), steps)
        header.append("met")
    rows = []
    for record in checks:
        check = record["validation"]
        row = [record["meta_step"], f"{check['score']:.3f}"]
        row += [_figure(check[m][b - 1]) for m in ("loss", "accuracy") for b in budgets]
        if requirement is not None:
            row.append("yes" if requirement.met(check) else "no")
        rows.append(row)
    return _shortened(header, rows)


def _adaptation(folder: Path) -> list[str]:
    result, about = _read(folder / ADAPT_FILE), read_json(folder / PROVENANCE_FILE)
    watched, test = result.get("requirement"), result.get("test")
    checks = watched["checks"] if watched else []
    losses = result["losses"]
    drawn = _picture(lambda plot: plot.plot_losses(losses, folder / "loss.png", checks))
    steps = f"{len(losses)} steps in {result['seconds']:g} s"
    sections = ["# Adaptation", *_cautions(seen_lines(result.get("seen", {})))]
    if watched:
        verdict = (
            f"**Met after {watched['met_step']} steps**, which is the classifier that is saved"
            if watched["met"]
            else f"**Not met**; the classifier of step {watched['kept_step']}, which came closest, "
            "is saved"
        )
        sections.append(f"`{watched['until']}`, on texts held out: {verdict}. {steps}.")
    else:
        sections.append(f"{steps}.")
    sections += ["![training loss](loss.png)"] if drawn else []
    if test:
        sections.append(_judged("The test file, read when all else was done", test))
    how = " (slightly optimistic, since they also chose when to stop)" if watched else ""
    if "confusion" in result:
        by_test = result.get("judged_by") == "--test"
        sections.append(_judged("The test file" if by_test else f"Texts held out{how}", result))
    if checks:
        header = list(checks[0])
        rows = [[check["step"], *map(_figure, list(check.values())[1:])] for check in checks]
        sections.append("## Checks on texts held out\n\n" + _shortened(header, rows))
    return [*sections, *_data_section(about), *_settings_section(about)]


def _judged(title: str, judged: Mapping[str, Any]) -> str:
    names = ("accuracy", "precision", "recall", "f1", "loss")
    row = [_figure(judged.get(name)) for name in names]
    if "accuracy_interval" in judged:  # files of earlier versions lack it
        low, high = judged["accuracy_interval"]
        row[0] += f" ({low:.3f} to {high:.3f})"
    figures = table(
        [
            "texts",
            "accuracy (95 % interval)",
            "macro precision",
            "macro recall",
            "macro F1",
            "loss",
        ],
        [[judged["texts"], *row]],
    )
    matrix = confusion_text(judged["labels"], np.array(judged["confusion"]))
    return f"## {title}\n\n{figures}\n\nConfusion, in texts:\n\n{matrix}"


def _comparison(file: Path) -> list[str]:
    result = _read(file)
    setting = result["setting"]
    classes = [class_pair(pair) for pair in setting["seen_classes"]]
    seen = {"domains": setting.get("seen_domains", []), "classes": classes}
    rows = [[name, _shown(value)] for name, value in setting.items() if name != "seen_classes"]
    return [
        "# Comparison",
        *_cautions(seen_lines(seen)),
        f"{result['episodes']} test episodes, {result['tuning_episodes']} for every learning rate "
        "of a baseline; 95 % intervals.",
        comparison_table(result).strip(),
        "## Setting\n\n" + table(["fact", "value"], rows),
    ]


def _data_section(about: Mapping[str, Any]) -> list[str]:
    data = about.get("data", {})
    if "sources" not in data:
        facts = [[name, _shown(value)] for name, value in data.items()]
        return ["## Data\n\n" + table(["", "contents, fingerprint"], facts)]
    prints = [
        [source["source"], *source["fingerprints"].values()]
        for source in data["sources"]
    ]  # fmt: skip
    parts = [
        "## Data\n\nClasses and texts: train / validation / test.",
        sources_table(data),
        *overlap_lines(data),
        "Fingerprints of texts, labels and domains:",
        table(["source", "train", "validation", "test"], prints),
    ]
    return ["\n\n".join(parts)]


def _settings_section(about: Mapping[str, Any]) -> list[str]:
    if not about.get("starts"):
        return [f"No {PROVENANCE_FILE}: options and versions are not known."]
    last = about["starts"][-1]
    options = [
        [f"--{name.replace('_', '-')}", _shown(value)]
        for name, value in last["options"].items()
        if value is not None and value is not False
    ]
    starts = [[start["time"], start["meta_step"]] for start in about["starts"]]
    sections = [
        f"## Options of `rnnopt {about['command']}`\n\n" + table(["option", "value"], options),
        "## Versions\n\n" + table(["", "version"], list(last["versions"].items())),
    ]
    if len(starts) > 1:
        sections.append("## Starts\n\n" + table(["time", "from meta-step"], starts))
    return sections


def _cautions(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"> **Overlap**: {line}." for line in lines)] if lines else []


def _picture(draw: Callable[[Any], None]) -> bool:
    try:
        from rnnopt.evaluation.report import plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print('no pictures, matplotlib is missing: pip install "rnnopt[meta]"')
        return False
    draw(plot)
    return True


def _shortened(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table, of evenly spaced rows if there are too many; the first and the last are kept."""
    if len(rows) <= _CHECKS_SHOWN:
        return table(header, rows)
    places = np.linspace(0, len(rows) - 1, _CHECKS_SHOWN).round().astype(int)
    return (
        f"{table(header, [rows[i] for i in places])}\n\n{_CHECKS_SHOWN} of {len(rows)} are shown."
    )


def _figure(value: float | None) -> str:
    return NOT_FINITE if value is None else f"{value:.3f}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: can't be read ({error}); it is damaged or no file of rnnopt's: make the run "
            "again"
        ) from error

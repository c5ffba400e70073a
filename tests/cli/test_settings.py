"""Settings: options, help and files come from the same typed fields."""

import json
import os
import pty
import subprocess
import sys
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from test_cli import adapt, compare, fails, meta_train, rule_file, run  # noqa: F401  # a fixture

from rnnopt.cli import progress
from rnnopt.cli.main import parse
from rnnopt.cli.settings import commands, groups
from rnnopt.cli.settings.commands import COMMANDS, Adapt, MetaTrain
from rnnopt.cli.settings.files import write_settings
from rnnopt.cli.settings.parser import flag_of, option_of
from rnnopt.meta.settings import Init, InnerRule
from rnnopt.tasks.text.classifier import Precision, Tune
from rnnopt.tasks.text.encoder.loading import Pooling
from rnnopt.tasks.text.start import Head

REQUIRED = ["meta-train", "--data", "stdlib", "--encoder", "e", "--output", "run"]
HEAVY = {"transformers", "peft", "higher", "matplotlib", "rich", "yaml"}


def helped(capsys, *words):
    with pytest.raises(SystemExit, match="0"):
        parse(words)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [kind.command for kind in COMMANDS])
def test_the_first_help_fits_on_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = helped(capsys, command, "--help").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_option_has_its_line_in_the_whole_help(kind, capsys):
    some = any(option_of(item).advanced for item in fields(kind))
    text = helped(capsys, kind.command, "--help-all" if some else "--help")
    for item in fields(kind):
        name = option_of(item).metavar if option_of(item).positional else flag_of(item)
        assert f"  {name}" in text
        assert option_of(item).text.endswith(".")


def test_old_spellings_still_work_and_are_not_shown(capsys):
    old = ["--judged", "0.5", "--calibrated", "0.3", "--sure-from", "4", "--max-meta-steps", "7"]
    names = {"--judged": "--query-share", "--calibrated": "--calibrated-share"}
    names |= {"--sure-from": "--confidence-from", "--max-meta-steps": "--meta-steps"}
    new = [names.get(word, word) for word in old]
    assert parse([*REQUIRED, *old]) == parse([*REQUIRED, *new]) != parse(REQUIRED)
    text = helped(capsys, "meta-train", "--help-all")
    assert not any(f"{word} " in text for word in old if word.startswith("--"))


def test_a_later_option_replaces_an_earlier_one():
    words = ["--tune", "lora", "head", "--ways", "3", "--tune", "full", "--ways", "4", "5"]
    settings = parse([*REQUIRED, *words])
    assert (settings.tune, settings.ways) == (["full"], [4, 5])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ways", "many"], "argument --ways: invalid int value: 'many'"),
        (["--tune", "some"], "argument --tune: invalid choice: 'some'"),
        (["--meta-st", "3"], "unrecognized arguments: --meta-st 3"),  # written in full
        (["--seed", "-1"], "must lie between 0 and 2**32 - 1"),
    ],
)
def test_a_mistake_is_told_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse([*REQUIRED, *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rnnopt meta-train: error: ")
    assert message in line
    assert line.endswith("see rnnopt meta-train --help")


def test_choices_are_those_of_the_rooms_below():
    """They are written out again, since the modules below load what --help does not need."""
    hints = get_type_hints(commands.LearnSettings)
    assert get_args(groups.Tune) == get_args(Tune)
    assert get_args(groups.Pooling) == get_args(Pooling)
    assert get_args(groups.Precision) == get_args(Precision)
    assert set(get_args(groups.Head)) == set(get_args(Head))
    for name, choices in (("inner", InnerRule), ("init", Init)):
        given = {"given"}  # a rule object, which only Python can hand over
        assert set(get_args(hints[name])) == set(get_args(choices)) - given


# -- files

FULL = MetaTrain(
    data=["a folder=2", "b: c"], encoder="no", output="yes", text_column="1", allow_overlap=True,
    tune=["head", "full"], top_layers=[None, 2], step_weights=[0.1, 1e-7], meta_lr=1e-5,
    until="accuracy@5>=0.85 and loss<1", origin="shipped", exact=["head"], seed=2**32 - 1,
    query_share=1 / 3, batch_size=[8, 4],
)  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        FULL,
        MetaTrain(data=["stdlib"], encoder="e", output="run"),
        Adapt(data="d.csv", encoder="e", output="o", lr=0.5, until="f1>0.9", adapt_only="head"),
        commands.Compare(data=["d"], encoder="e", json="j", fewer_ways=True, tuning_data=["t"]),
    ],
)
def test_settings_come_back_from_their_file(settings, tmp_path):
    write_settings(tmp_path / "settings.yaml", settings)
    assert parse([settings.command, "--config", str(tmp_path / "settings.yaml")]) == settings


def test_options_override_the_file(tmp_path):
    write_settings(tmp_path / "s.yaml", FULL)
    words = ["--tune", "lora", "--no-allow-overlap", "--meta-lr", "3", "--top-layers", "all"]
    settings = parse(["meta-train", *words, f"--config={tmp_path / 's.yaml'}"])
    assert (settings.tune, settings.allow_overlap, settings.meta_lr) == (["lora"], False, 3)
    assert (settings.top_layers, settings.ways, settings.until) == ([None], [5], FULL.until)


def test_a_recipe_needs_no_more_than_what_differs(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("meta-lr: 1e-3\nsure_from: 3\ntune: head\ntop_layers: all\nresume: false\n")
    settings = parse([*REQUIRED, "--config", str(recipe)])
    assert (settings.meta_lr, settings.confidence_from, settings.tune) == (1e-3, 3, ["head"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read as YAML: [Errno 2] No such file"),
        ("a: [1", "can't be read as YAML: while parsing"),
        ("steps: " + "9" * 5000, "can't be read as YAML: Exceeds the limit"),
        ("a: " + "[" * 50_000, "can't be read as YAML: maximum recursion depth"),
        (
            "a0: &a0 [1]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
            "holds more than 10000 values",
        ),
        ("- 1", "holds no options; write one to a line, such as meta_lr: 0.005"),
        ("colour: red", "rnnopt adapt has no option 'colour'; see rnnopt adapt --help-all"),
        ("command: compare", "settings of rnnopt compare, and this is rnnopt adapt"),
    ],
)
def test_a_file_that_can_not_be_used(content, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    line = fails(["adapt", "--config", recipe], capsys)
    assert f"--config {recipe}: " in line
    assert message in line


def test_a_run_is_repeated_by_its_settings(csv_file, encoder, tmp_path):
    more = "--tune head lora --shortest 1 --query-share 0.5 --calibrated-share 0.5 --seed 3"
    first = tmp_path / "first"
    assert run(meta_train(csv_file, encoder, first, *more.split())) == 0
    config = ["meta-train", "--config", first / "settings.yaml"]
    assert run([*config, "--output", tmp_path / "second"]) == 0
    name = "rule.safetensors"
    assert (first / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    other = tmp_path / "other"
    assert run([*config, "--output", other, "--seed", 4]) == 0
    assert (first / name).read_bytes() != (other / name).read_bytes()
    assert run([*config, "--resume"]) == 0  # the folder is among the settings


def test_adapt_and_compare_are_repeated_by_their_settings(
    csv_file, encoder, rule_file, tmp_path  # noqa: F811
):  # fmt: skip
    folders = tmp_path / "one", tmp_path / "two"
    assert run(adapt(csv_file, encoder, folders[0], "--rule", rule_file)) == 0
    config = folders[0] / "settings.yaml"
    assert run(["adapt", "--config", config, "--output", folders[1]]) == 0
    first, second = (json.loads((folder / "adapt.json").read_text()) for folder in folders)
    assert first["losses"] == second["losses"]
    out = tmp_path / "result.json"
    assert run(compare(csv_file, encoder, rule_file, out)) == 0
    config = tmp_path / "result.json.settings.yaml"
    assert run(["compare", "--config", config, "--json", tmp_path / "again.json"]) == 0
    first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("result", "again")
    )
    assert first["setting"] == second["setting"]
    for name in first["methods"]:
        assert first["methods"][name]["loss"] == second["methods"][name]["loss"]


# -- what the command loads and shows


def loaded(code):
    code += "; import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_loads_its_libraries_when_it_runs():
    assert not HEAVY & loaded("import rnnopt.cli.main")


@pytest.mark.slow
def test_the_test_above_can_fail():
    assert {"transformers", "rich"} <= loaded("import rnnopt.cli.meta_train")


def test_a_bar_is_drawn_on_a_terminal_and_a_pipe_gets_its_lines():
    code = "from rnnopt.cli.progress import progress_bar\n"
    code += "with progress_bar('step', 3) as bar: print('a line'); bar.advance(note='loss 1')"
    terminal, end = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    with os.fdopen(terminal, "rb") as drawn:
        drawn = drawn.read1(100_000).decode()
    assert done.stdout == b"a line\n"
    assert "1/3" in drawn and "loss 1" in drawn


def test_progress_is_silent_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.waiting("loading"), progress.progress_bar("step", 3) as bar:
        print("a line [that] stays as it is")
        bar.advance(note="loss 1")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a line [that] stays as it is\n", "")
    monkeypatch.setattr(progress, "_SILENCE", -1.0)
    with progress.progress_bar("step", 3) as bar:
        bar.advance(note="loss 1")
    with progress.progress_bar("fitting, step") as bar:
        bar.advance(note="fold 1")
    assert capsys.readouterr().err == "step 1 of 3 loss 1\nfitting, step 1 fold 1\n"

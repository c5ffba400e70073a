"""Initial values through the command, as a user types it."""

import json

import pytest
import torch
from rule_table import random_lstm
from test_processes import init_command as meta_train

from rnnopt import SGD, MetaSGD, load_rule, save_rule
from rnnopt.cli.main import main
from rnnopt.cli.settings.groups import RuleSettings
from rnnopt.cli.settings.loading import choose_start
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.init_folder import save_init
from rnnopt.tasks.text.start import TextStart


def run(command, *more):
    return main([str(word) for word in (*command.split(), *more)])


def options(csv_file, encoder):
    return f"--data {csv_file} --encoder {encoder} --lora-rank 2 "


def fails(command, capsys):
    """Run a command that must fail as a user's mistake does; its one line."""
    assert run(command) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def run_folder(csv_file, encoder, tmp_path_factory):
    """A finished run: Meta-SGD and initial values, from prototype heads."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert run(meta_train(csv_file, encoder, folder, "--inner meta-sgd --head prototype")) == 0
    return folder


@pytest.mark.parametrize(
    "more",
    [
        "--inner sgd --order 2 --inner-lr 0.01 --step-weights 0 1",
        "--inner meta-sgd --order 2 --adapt-only head --head prototype --tune full",
        "--inner adam --init reptile --head zero --tune full --pooling mean",
        "--inner lstm --init-penalty 0.01 --data FOLDER --ways 2 3 --head prototype",
    ],
)
def test_every_kind_of_meta_training_leaves_a_rule_and_initial_values(
    csv_file, encoder, tmp_path, capsys, more
):
    lines = csv_file.read_text().splitlines()[1:]
    for part, classes in {"train": (0, 5), "val": (5, 9), "test": (9, 10)}.items():
        rows = lines[24 * classes[0] : 24 * classes[1]]  # 24 texts a class
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{part}.csv").write_text("\n".join(["text,label", *rows]))
    more = more.replace("FOLDER", str(tmp_path / "data"))
    assert run(meta_train(csv_file, encoder, tmp_path / "run", more)) == 0
    load_rule(tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "init" / "init.json").read_text())
    assert facts["training"]["classes"]
    assert "the initial values that go with it" in capsys.readouterr().out


def test_adapt_starts_from_the_initial_values_and_the_head_that_go_with_them(
    csv_file, encoder, run_folder, tmp_path
):
    first = {}
    for name, more in (
        ("learned", f"--init {run_folder}"),
        ("other head", f"--init {run_folder / 'init'} --head random"),
        ("prototypes alone", "--head prototype"),
    ):
        command = f"adapt {options(csv_file, encoder)} --allow-overlap --steps 1 {more}"
        command += f" --rule {run_folder}"
        assert run(command, "--output", tmp_path / name) == 0
        first[name] = json.loads((tmp_path / name / "adapt.json").read_text())["losses"][0]
    assert len(set(first.values())) == 3


def test_compare_starts_every_method_there_and_keeps_its_runs_apart(
    csv_file, encoder, run_folder, tmp_path, capsys
):
    losses = {"learned": set(), "adamw": set()}
    starts = (
        "--head zero",
        f"--init {run_folder} --head zero",
        f"--init {run_folder}",
        f"--init {run_folder} --adapt-only head",
    )
    for number, more in enumerate(starts):
        command = (
            f"compare {options(csv_file, encoder)} --ways 2 --shots 2 --queries 3 --steps 2 "
            f"--episodes 2 --tuning-episodes 2 --baselines adamw --rule {run_folder} "
            f"--json {tmp_path / str(number)} {more}"
        )
        assert run(command) == 0
        result = json.loads((tmp_path / str(number)).read_text())
        for name, found in losses.items():
            found.add(result["methods"][name]["loss"]["2"]["mean"])
    assert {name: len(found) for name, found in losses.items()} == {"learned": 4, "adamw": 4}
    assert result["setting"]["head"] == "prototype"
    other = command.replace(f"--init {run_folder}", "")
    assert "init: " in fails(other, capsys)  # the journal is that of other starts


def test_head_and_what_is_adapted_are_those_of_the_init_unless_said_otherwise(encoder, tmp_path):
    classifier = Classifier.load(encoder, lora_rank=2, ways=2, device=torch.device("cpu"))
    start = TextStart("head", classifier.initial_values, "prototype")
    save_init(tmp_path / "init", classifier, start, {})
    for head, expected in ((None, "prototype"), ("zero", "zero")):
        found = choose_start(RuleSettings(init=tmp_path, head=head), classifier)
        assert (found.head, found.adapted) == (expected, "head")
    assert choose_start(RuleSettings(), classifier) == TextStart()


def test_compare_refuses_classes_that_the_initial_values_have_seen(
    csv_file, encoder, run_folder, tmp_path, capsys
):
    save_rule(random_lstm(), tmp_path / "rule")  # which remembers nothing
    command = (
        f"compare {options(csv_file, encoder)} --ways 2 --shots 2 --queries 3 --steps 1 "
        f"--episodes 2 --tuning-episodes 2 --baselines adamw --rule {tmp_path / 'rule'} "
        f"--init {run_folder} --seed 3 --json {tmp_path / 'result.json'}"
    )
    assert "1 classes that meta-training, of the rule or the initial values, has seen" in fails(
        command, capsys
    )
    assert run(f"{command} --allow-overlap") == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--lora-rank 4", "lora_rank: 2 there, 4 here"),
        ("--tune full", "tune: 'lora' there, 'full' here"),
        ("--init nowhere", "--init nowhere: no init.json"),
    ],
)
def test_an_init_that_does_not_fit_is_refused(
    csv_file, encoder, run_folder, tmp_path, capsys, more, message
):
    command = f"adapt {options(csv_file, encoder)} --allow-overlap --output {tmp_path / 'out'} "
    command += f"--init {run_folder} "
    assert message in fails(command + more, capsys)
    assert not (tmp_path / "out").exists()


def test_learned_rates_for_other_tensors_are_refused(
    csv_file, encoder, run_folder, tmp_path, capsys
):
    command = f"adapt {options(csv_file, encoder)} --allow-overlap --tune full --rule {run_folder} "
    message = fails(f"{command} --output {tmp_path / 'out'}", capsys)
    assert "the rule has learned rates for" in message
    assert "and none for bert.embeddings" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--tune lora full", "one kind of classifier, and these are 2; give one --tune"),
        ("--tune head", "only the output layer trains"),
        ("--order 2 --truncation 1", "values would get no gradient from the steps after a cut"),
        ("--init pretrained --inner sgd", "neither has anything to learn"),
        ("--init-penalty nan", "init_penalty=nan: must be finite"),
    ],
)
def test_bad_options_of_meta_train(csv_file, encoder, tmp_path, capsys, more, message):
    assert message in fails(meta_train(csv_file, encoder, tmp_path / "out", more), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [SGD, lambda lr: MetaSGD(["a", "b"], lr)])
def test_other_rules_come_back_from_their_file(tmp_path, make):
    rule = make(0.3)
    for weight in rule.parameters():
        weight.data.add_(torch.randn_like(weight))
    save_rule(rule, tmp_path / "rule")
    again = load_rule(tmp_path / "rule")
    assert type(again) is type(rule)
    assert again.config == rule.config
    assert all(map(torch.equal, rule.parameters(), again.parameters()))

"""The command, as a user types it: real files in, real files out, and clear words for mistakes."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from encoders import tiny_llama
from rule_table import random_lstm
from safetensors.torch import save_file

from rnnopt import Adam, load_rule, save_rule
from rnnopt.cli.main import main
from rnnopt.cli.settings.commands import MetaTrain
from rnnopt.cli.settings.loading import load_kinds
from rnnopt.cli.until import steps_for
from rnnopt.data.splits import class_sketches, read_splits
from rnnopt.rules.files import SHIPPED_RULE, read_training

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def rule_file(tmp_path_factory):
    """An untrained rule: Adam."""
    rule = random_lstm()
    rule.zero_output()
    path = tmp_path_factory.mktemp("rule") / "rule.safetensors"
    save_rule(rule, path)
    return path


def meta_train(csv_file, encoder, folder, *more):
    return [
        "meta-train", "--data", csv_file, "--encoder", encoder, "--ways", "2", "--shots", "1", "2",
        "--queries", "3", "--steps", "2", "--tune", "head", "--meta-steps", "4",
        "--validate-every", "2", "--validation-tasks", "2", "--output", folder, *more,
    ]  # fmt: skip


def adapt(data, encoder, folder, *more):
    return [
        "adapt",
        "--data",
        data,
        "--encoder",
        encoder,
        "--steps",
        "3",
        "--output",
        folder,
        *more,
    ]


def compare(csv_file, encoder, rule_file, out, *more):
    return [
        "compare", "--data", csv_file, "--encoder", encoder, "--rule", rule_file, "--ways", "2",
        "--shots", "2", "--queries", "3", "--episodes", "2", "--tuning-episodes", "2",
        "--steps", "2", "--tune", "head", "--json", out, *more,
    ]  # fmt: skip


def run(arguments):
    return main([str(argument) for argument in arguments])


def fails(arguments, capsys):
    """Run a command that must fail as a user's mistake does; its one line."""
    assert run(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"rnnopt {arguments[0]}: error: ")
    assert "Traceback" not in error
    return error


def test_meta_train_leaves_rule_log_and_picture(csv_file, encoder, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(meta_train(csv_file, encoder, folder)) == 0
    load_rule(folder)
    assert len((folder / "log.jsonl").read_text().splitlines()) == 5
    assert (folder / "learning.png").read_bytes().startswith(PNG)
    assert "validation meta-loss" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--tune", "lora", "--lora-rank", "2"], ["--pooling", "mean"]])
def test_meta_train_at_second_order(csv_file, encoder, tmp_path, more):
    assert run(meta_train(csv_file, encoder, tmp_path / "run", "--order", "2", *more)) == 0


@pytest.mark.parametrize("more", [("--order", "2"), ("--exact", "lora")])
def test_meta_train_at_second_order_on_a_decoder(csv_file, tmp_path, more):
    decoder = tiny_llama(tmp_path / "llama")  # it runs through a slice of its list of layers
    arguments = meta_train(csv_file, decoder, tmp_path / "run", "--tune", "lora", *more)
    assert run([*arguments, "--meta-steps", "1", "--validation-tasks", "1", "--steps", "1"]) == 0


def test_exact_kinds_stand_among_those_that_train(csv_file, encoder, tmp_path, capsys):
    command = meta_train(csv_file, encoder, tmp_path / "run", "--tune", "head", "full", "--exact")
    assert "--exact lora: not among --tune head full" in fails([*command, "lora"], capsys)
    assert run([*command, "head"]) == 0
    assert read_training(tmp_path / "run")["settings"]["second_order_for"] == ["head"]


def test_meta_train_over_several_kinds_of_what_trains(csv_file, encoder, tmp_path):
    more = (
        "--tune head lora full --lora-rank 2 4 --pooling model mean --shots 1 2 5 --most-support 4 "
        "--tasks 3"
    )
    folder = tmp_path / "run"
    assert run(meta_train(csv_file, encoder, folder, *more.split())) == 0
    training = read_training(folder)
    assert training["tune"] == ["head", "lora", "full"]
    assert training["lora_rank"] == [2, 4]


def test_the_kinds_are_all_combinations_each_loaded_once(encoder):
    settings = MetaTrain(
        data=["stdlib"], output="run", encoder=encoder, tune=["head", "lora", "lora"],
        lora_rank=[2, 4], ways=[3], exact=["lora"], max_length=32, precision="fp32",
    )  # fmt: skip
    kinds = load_kinds(settings, torch.device("cpu"))
    assert len(kinds) == 6
    sizes = [sum(param.numel() for _, param in kind.trainable()) for kind in kinds]
    head, small, large = sorted(set(sizes))
    assert sizes == [head, head, small, large, small, large]
    assert len(set(map(id, kinds))) == 3


def test_a_run_remembers_top_layers_and_precision(csv_file, encoder, rule_file, tmp_path, capsys):
    more = ["--tune", "lora", "--top-layers", "1", "--precision", "bf16"]
    command = meta_train(csv_file, encoder, tmp_path / "run", *more)
    assert run(command) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run(compare(csv_file, encoder, rule_file, tmp_path / "result.json", *more)) == 0
    setting = json.loads((tmp_path / "result.json").read_text())["setting"]
    assert (facts["top_layers"], facts["precision"]) == ([1], "bf16")
    assert (setting["top_layers"], setting["precision"]) == (1, "bf16")
    assert run(adapt(csv_file, encoder, tmp_path / "classifier", *more)) == 0
    other = [*command, "--resume", "--precision", "fp32"]
    assert "precision: 'bf16' there, 'fp32' here" in fails(other, capsys)


def test_meta_train_on_the_embedded_corpus(encoder, tmp_path):
    assert run(meta_train("stdlib", encoder, tmp_path / "run")) == 0


def test_adapt_saves_a_folder_that_the_pipeline_loads(
    csv_file, encoder, rule_file, tmp_path, capsys
):
    import transformers

    folder = tmp_path / "classifier"
    assert run(adapt(csv_file, encoder, folder, "--rule", rule_file)) == 0
    out = capsys.readouterr().out
    assert "macro precision" in out
    report = json.loads((folder / "adapt.json").read_text())
    assert set(report) >= {"accuracy", "precision", "recall", "f1", "losses"}
    assert len(report["losses"]) == 3
    assert report["texts"] == 50  # a fifth of each class's 24, rounded
    assert (folder / "loss.png").read_bytes().startswith(PNG)
    answer = transformers.pipeline("text-classification", str(folder))("play a song")
    assert answer[0]["label"] in {
        line.split(",")[1] for line in csv_file.read_text().split("\n")[1:-1]
    }


def test_adapt_judges_by_the_test_file_that_is_given(csv_file, encoder, rule_file, tmp_path):
    test = tmp_path / "test.tsv"
    test.write_text("label\tutterance\nmusic\tplay a song\nsport\twho won the match\n")
    wide = tmp_path / "train.tsv"
    rows = [line.rsplit(",", 1) for line in csv_file.read_text().splitlines()[1:]]
    wide.write_text("label\tutterance\n" + "".join(f"{label}\t{text}\n" for text, label in rows))
    more = ["--test", test, "--text-column", "utterance", "--rule", rule_file]
    assert run(adapt(wide, encoder, tmp_path / "out", *more)) == 0
    assert json.loads((tmp_path / "out" / "adapt.json").read_text())["texts"] == 2


def test_adapt_lowers_the_training_loss(csv_file, encoder, tmp_path):
    save_rule(Adam(5e-3), tmp_path / "adam.safetensors")
    more = ["--steps", "10", "--tune", "full", "--batch-size", "200"]
    more += ["--rule", tmp_path / "adam.safetensors"]
    assert run(adapt(csv_file, encoder, tmp_path / "out", *more)) == 0
    losses = json.loads((tmp_path / "out" / "adapt.json").read_text())["losses"]
    assert losses[-1] < losses[0] - 0.1


def test_adapt_without_a_rule_takes_the_shipped_one(csv_file, encoder, tmp_path, capsys):
    assert run(adapt(csv_file, encoder, tmp_path / "out")) == 0
    assert "on 50 texts held out: accuracy " in capsys.readouterr().out


def test_adapt_says_where_its_steps_are_too_few_for_the_file(csv_file, encoder, tmp_path, capsys):
    assert run(adapt(csv_file, encoder, tmp_path / "out", "--batch-size", 8)) == 0
    out = capsys.readouterr().out
    assert "3 steps of 8 texts: 24 of 190 training texts were seen, the others never" in out
    assert "--steps 24 or more" in out


def test_adapt_takes_as_many_steps_as_the_file_wants(csv_file, encoder, tmp_path, capsys):
    command = [word for word in adapt(csv_file, encoder, tmp_path / "out", "--batch-size", 4)]
    place = command.index("--steps")
    assert run(command[:place] + command[place + 2 :]) == 0
    out = capsys.readouterr().out
    assert "95 steps of 4 texts: each of 190 training texts was seen 2.0 times" in out
    assert json.loads((tmp_path / "out" / "adapt.json").read_text())["steps"] == 95


@pytest.mark.parametrize(
    ("texts", "size", "steps"), [(10, 64, 20), (640, 64, 20), (3400, 64, 107), (10**6, 64, 1000)]
)
def test_the_steps_grow_with_the_texts_up_to_a_bound(texts, size, steps):
    assert steps_for(texts, size, 20) == steps


def test_compare_writes_the_figures_and_the_picture(csv_file, encoder, rule_file, tmp_path, capsys):
    out, plot = tmp_path / "result.json", tmp_path / "result.png"
    assert run(compare(csv_file, encoder, rule_file, out, "--plot", plot)) == 0
    result = json.loads(out.read_text())
    assert set(result["methods"]) == {"learned", "adamw", "sgd"}
    assert set(result["methods"]["learned"]["accuracy"]) == {"1", "2"}
    assert plot.read_bytes().startswith(PNG)
    assert "| learned " in capsys.readouterr().out


def test_compare_by_classes_fewer_than_ways_says_so(csv_file, encoder, rule_file, tmp_path, capsys):
    more = (
        "--ways 30 --fewer-ways --report-on all --tuning-data stdlib --shots 1 --queries 2 "
        "--steps 1 --tuned-steps 2 --baselines sgd,nearest-mean,adamw-default"
    )
    out = tmp_path / "o.json"
    assert run(compare(csv_file, encoder, rule_file, out, *more.split())) == 0
    result = json.loads(out.read_text())
    ways = result["setting"]["ways_used"]
    assert ways["report"] == 10 and 2 <= ways["tuning"] < 30
    printed = capsys.readouterr().out
    assert f"fewer classes than ways, so {ways}" in printed
    (row,) = (line for line in printed.splitlines() if line.startswith("| accuracy after"))
    assert row == "| accuracy after | 1 | 2 |"
    assert re.search(r"\| \*learned - sgd, paired\* \| [+-]\d\.\d{3} ± \d\.\d{3} \|", printed)
    (learned, _) = (line for line in printed.splitlines() if line.startswith("| learned |"))
    assert learned.endswith(" |  |")  # it has no second step, which only the tuned take
    assert set(result["methods"]["nearest-mean"]["loss"]) == {"1"}


def test_compare_without_a_baselines_package(
    csv_file, encoder, rule_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    command = compare(csv_file, encoder, rule_file, tmp_path / "o.json", "--baselines", "prodigy")
    assert 'pip install "rnnopt[compare]"' in fails(command, capsys)


def test_compare_again_needs_no_new_runs(csv_file, encoder, rule_file, tmp_path):
    out = tmp_path / "result.json"
    run(compare(csv_file, encoder, rule_file, out))
    journal = out.with_name("result.json.runs")
    first, lines = out.read_text(), journal.read_text()
    run(compare(csv_file, encoder, rule_file, out))
    assert (out.read_text(), journal.read_text()) == (first, lines)


def test_compare_refuses_classes_that_the_rule_has_seen(csv_file, encoder, tmp_path, capsys):
    splits = read_splits([csv_file])
    save_rule(random_lstm(), tmp_path / "rule", {"classes": class_sketches(splits.test)})
    command = compare(csv_file, encoder, tmp_path / "rule", tmp_path / "o.json")
    assert "2 classes that meta-training, of the rule or the initial values, has seen" in fails(
        command, capsys
    )
    assert run([*command, "--allow-overlap"]) == 0
    assert "CAUTION: 2 test classes were seen" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "o.json").read_text())["setting"]["seen_classes"]) == 2


def test_a_full_disk_or_no_permission_loses_nothing(csv_file, encoder, rule_file, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "result.json"  # below a file nothing can be written, even by root
    assert "can't" in fails(compare(csv_file, encoder, rule_file, out), capsys)
    assert "can't write" in fails(meta_train(csv_file, encoder, tmp_path / "file" / "run"), capsys)
    assert (tmp_path / "file").read_text() == "kept"


BAD_DATA = {
    "missing": (None, "nowhere.csv"),
    "empty": ("", "no rows, needs at least one"),
    "no column": ("sentence,label\na,b\n", "no column 'text'"),
    "bad encoding": (b"text,label\nok,a\n\xff\xfe,b\n", "line 3"),
    "one class": ("text,label\n" + "".join(f"t {i},a\n" for i in range(9)), "at least"),
}


@pytest.mark.parametrize("name", BAD_DATA)
@pytest.mark.parametrize("command", [meta_train, adapt])
def test_bad_data_is_refused_before_anything_is_written(command, name, encoder, tmp_path, capsys):
    content, message = BAD_DATA[name]
    data = tmp_path / "nowhere.csv"
    if content is not None:
        data.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in fails(command(data, encoder, tmp_path / "out"), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ways", "30"], "lower --ways"),
        (["--shots", "22"], "lower --ways, --shots or --queries"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--meta-steps", "0"], "meta_steps=0: must be at least 1"),
        (["--shortest", "9"], "shortest unroll of 9 steps"),
        (["--encoder", "no/such-encoder-anywhere"], "no/such-encoder-anywhere"),
        (["--max-length", "1"], "max_length"),
    ],
)
def test_bad_options_of_meta_train(csv_file, encoder, tmp_path, capsys, more, message):
    command = meta_train(csv_file, encoder, tmp_path / "out", *more)
    assert message in fails(command, capsys)


@pytest.mark.parametrize("seed", ["-1", str(2**40)])
def test_a_seed_out_of_range(csv_file, encoder, tmp_path, capsys, seed):
    with pytest.raises(SystemExit, match="2"):
        run(meta_train(csv_file, encoder, tmp_path / "out", "--seed", seed))
    assert "must lie between 0 and 2**32 - 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr", "-1"], "--lr -1.0: must be finite and at least 0.01"),
        (["--lr", "nan"], "--lr nan: must be finite"),
        (["--lr", "1e-3"], "multiplies the learned step, and 1 is as meta-trained: leave it out"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    ],
)
def test_bad_options_of_adapt(csv_file, encoder, tmp_path, capsys, more, message):
    assert message in fails(adapt(csv_file, encoder, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["adapt", "compare", "inspect"])
def test_a_rule_that_can_not_be_read_is_found_before_data_and_encoder(command, tmp_path, capsys):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    output = ["--json" if command == "compare" else "--output", tmp_path / "out.json"]
    words = [command, "--data", "no.csv", "--encoder", "no/such folder", *output]
    rule = tmp_path / "other.safetensors"
    if command == "inspect":
        words += [rule, "--device", "cpu"]
    else:
        words += ["--rule", rule]
    assert "holds 'no rnnopt rule', expected" in fails(words, capsys)
    assert not (tmp_path / "out.json").exists()


def test_adapt_leaves_test_texts_out_of_training(csv_file, encoder, rule_file, tmp_path, capsys):
    test = tmp_path / "test.csv"
    test.write_text("text,label\n" + "\n".join(csv_file.read_text().splitlines()[1:4]) + "\n")
    command = adapt(csv_file, encoder, tmp_path / "out", "--rule", rule_file, "--test", test)
    assert run(command) == 0
    out = capsys.readouterr().out
    assert "left out of training, since they are in --test: 3 texts" in out
    assert "training: 237 texts" in out and "--test: 3 texts" in out
    # three texts say little, and they are no texts held out
    assert "on 3 texts of --test: accuracy" in out and "held out" not in out
    assert re.search(r"accuracy [01]\.\d{3} \(95 % interval 0\.\d{3} to [01]\.\d{3}\)", out)
    facts = json.loads((tmp_path / "out" / "adapt.json").read_text())
    low, high = facts["accuracy_interval"]
    assert low <= facts["accuracy"] <= high and high - low > 0.5
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## The test file" in report and "held out" not in report.split("## Options")[0]


def test_a_label_whose_texts_are_all_in_the_test_is_refused_by_its_lines(
    encoder, rule_file, tmp_path, capsys
):
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("text,label\nx one,A\ny two,B\nz three,C\n")
    test.write_text("text,label\nw four,B\nZ  three,A\n")
    command = adapt(train, encoder, tmp_path / "out", "--rule", rule_file, "--test", test)
    error = fails(command, capsys)
    assert f"label 'C': all its texts are in --test too, such as line 4 of {train}" in error
    assert f"line 3 of {test}" in error
    assert not (tmp_path / "out").exists()


def test_a_classifier_that_learned_nothing_is_told(csv_file, encoder, tmp_path, capsys):
    save_rule(Adam(1e-12), tmp_path / "still.safetensors")
    command = adapt(csv_file, encoder, tmp_path / "out", "--rule", tmp_path / "still.safetensors")
    assert run(command) == 0
    assert "no better than always answering" in capsys.readouterr().out


def test_one_episode_is_too_few_for_an_interval(csv_file, encoder, rule_file, tmp_path, capsys):
    command = compare(csv_file, encoder, rule_file, tmp_path / "o.json", "--episodes", "1")
    assert "--episodes 1: must be at least 2" in fails(command, capsys)


def test_a_result_of_another_setting_is_not_overwritten(
    csv_file, encoder, rule_file, tmp_path, capsys
):
    out = tmp_path / "o.json"
    run(compare(csv_file, encoder, rule_file, out))
    before = out.read_bytes(), out.with_name("o.json.runs").read_bytes()
    message = fails(compare(csv_file, encoder, rule_file, out, "--queries", "2"), capsys)
    assert "another comparison (queries: 3 there, 2 here); choose another --json" in message
    assert (out.read_bytes(), out.with_name("o.json.runs").read_bytes()) == before


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def bare(settings):
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr("rnnopt.cli.demo.run", bare)
    assert main(["demo"]) == 2
    assert 'rich is missing: pip install "rnnopt[meta]"' in capsys.readouterr().err


def test_a_folder_that_is_no_model(csv_file, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    message = fails(adapt(csv_file, tmp_path / "model", tmp_path / "out"), capsys)
    assert "has no config.json" in message


def test_a_rule_file_that_is_none(csv_file, encoder, tmp_path, capsys):
    (tmp_path / "rule").write_text("not a rule")
    command = adapt(csv_file, encoder, tmp_path / "out", "--rule", tmp_path / "rule")
    assert "no complete safetensors file" in fails(command, capsys)


@pytest.mark.parametrize("command", [meta_train, adapt])
def test_a_folder_with_other_work_is_left_alone(csv_file, encoder, tmp_path, capsys, command):
    (tmp_path / "thesis.txt").write_text("kept")
    assert "choose another --output" in fails(command(csv_file, encoder, tmp_path), capsys)
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(csv_file, encoder, tmp_path, capsys):
    command = adapt(csv_file, encoder, tmp_path / "out", "--device", "cuda")
    assert "use --device cpu or auto" in fails(command, capsys)


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("rnnopt.cli.demo.run", interrupted)
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_python_m_rnnopt_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "rnnopt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0.1.0"


def test_meta_train_begins_with_another_rule_and_remembers_its_classes(
    csv_file, encoder, tmp_path, capsys
):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(meta_train(csv_file, encoder, first)) == 0
    assert run(meta_train(csv_file, encoder, second, "--from", first, "--meta-lr", "1e-12")) == 0
    for name, weight in load_rule(first).named_parameters():
        torch.testing.assert_close(load_rule(second).get_parameter(name), weight)
    # a rule of other classes, continued: what it had seen is not forgotten
    other = tmp_path / "other.safetensors"
    seen = {"elsewhere/x": ["0" * 12]}
    save_rule(load_rule(first), other, {"classes": seen})
    third = tmp_path / "third"
    assert run(meta_train(csv_file, encoder, third, "--from", other)) == 0
    assert read_training(third)["classes"] == {**seen, **read_training(first)["classes"]}


def test_meta_train_begins_with_the_shipped_rule(csv_file, encoder, tmp_path):
    folder = tmp_path / "run"
    assert (
        run(meta_train(csv_file, encoder, folder, "--from", "shipped", "--meta-lr", "1e-12")) == 0
    )
    for name, weight in load_rule(SHIPPED_RULE).named_parameters():
        torch.testing.assert_close(load_rule(folder).get_parameter(name), weight)
    assert "clinc150/book_hotel" in read_training(folder)["classes"]


def test_meta_train_refuses_rules_that_it_cannot_begin_with(csv_file, encoder, tmp_path, capsys):
    def refused(rule, *more):
        save_rule(rule, tmp_path / "rule.safetensors", training)
        options = ("--from", tmp_path / "rule.safetensors", *more)
        return fails(meta_train(csv_file, encoder, tmp_path / "run", *options), capsys)

    training = {}
    few = random_lstm(coordinate_units=4)
    assert "has 4 hidden units, not 8; leave --hidden-size out" in refused(few, "--hidden-size", 8)
    assert "holds Adam, expected an LSTM" in refused(Adam(1e-3))
    assert "leave --inner out, or leave" in refused(random_lstm(), "--inner", "sgd")
    assert "the LSTM decides its own steps" in refused(random_lstm(), "--inner-lr", "0.5")
    training = {"classes": class_sketches(read_splits([csv_file]).validation)}
    assert "which are to choose the new rule; use other data" in refused(random_lstm())

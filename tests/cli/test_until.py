"""Until it is good enough: meta-training and adaptation that end where a requirement is met."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rule_table import random_lstm
from safetensors.torch import load_file
from test_cli import adapt, compare, fails, meta_train, run

from rnnopt import Adam, InputError, LearnedOptimizer, save_rule
from rnnopt.cli.until import Watch, judge_unseen
from rnnopt.data.corpus import Corpus
from rnnopt.data.splits import class_sketches, read_splits
from rnnopt.rules.files import read_training
from rnnopt.tasks.requirement import NOT_MET, Requirement
from rnnopt.tasks.text.adapt import confusion_matrix, fit, judge_texts
from rnnopt.tasks.text.classifier import Classifier

EVERY = [
    "--tune", "full", "--pooling", "mean", "--validate-every", "1", "--meta-steps", "5",
    "--meta-lr", "0.05",
]  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder, prefix="rule."):
    """The rule as it stood at the checkpoint, or the best one."""
    leaves = load_file(folder / "checkpoint.safetensors")
    return {k.removeprefix(prefix): v for k, v in leaves.items() if k.startswith(prefix)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def adam_rule(tmp_path_factory):
    """An untrained rule, which is Adam, and has seen nothing."""
    rule = random_lstm()
    rule.zero_output()
    path = tmp_path_factory.mktemp("rule") / "rule.safetensors"
    save_rule(rule, path)
    return path


@pytest.fixture(scope="module")
def plain(csv_file, encoder, tmp_path_factory):
    """A run of 5 meta-steps, validated after each, that nothing stops."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert run(meta_train(csv_file, encoder, folder, *EVERY)) == 0
    return folder


@pytest.fixture(scope="module")
def reachable(plain):
    """(a requirement, the first meta-step that meets it, neither the first nor the last)."""
    losses = [record["validation"]["loss"] for record in records(plain)]
    for step in range(1, 5):
        for budget in (1, 2):
            now, before = losses[step][budget - 1], [loss[budget - 1] for loss in losses[:step]]
            if now < min(before):
                return f"loss@{budget}<={now}", step
            if now > max(before):
                return f"loss@{budget}>={now}", step
    raise AssertionError(f"nothing to require of {losses}")


def test_meta_training_stops_where_the_requirement_is_met(
    plain, reachable, csv_file, encoder, tmp_path, capsys
):
    requirement, step = reachable
    command = meta_train(csv_file, encoder, tmp_path / "run", *EVERY, "--until", requirement)
    assert run(command) == 0
    lines = records(tmp_path / "run")
    assert lines[-1]["meta_step"] == step
    assert [line["validation"]["met"] for line in lines] == [False] * step + [True]
    out = capsys.readouterr().out
    assert out.count(": not met, go on") == step
    assert out.count(": met, stop") == 1
    kept = load_file(tmp_path / "run" / "rule.safetensors")
    assert same(kept, weights(tmp_path / "run"))
    assert read_training(tmp_path / "run")["meta_step"] == step
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"**Met at meta-step {step}**" in report
    # taken up again it has nothing to do
    assert run([*command, "--resume"]) == 0
    assert ": met, stop" in capsys.readouterr().out
    assert records(tmp_path / "run")[-1]["meta_step"] == step
    # with a requirement out of reach it goes on as the run that nothing stopped, to the bit
    further = meta_train(csv_file, encoder, tmp_path / "run", *EVERY, "--until", "accuracy>=1")
    assert run([*further, "--resume"]) == NOT_MET
    assert same(weights(tmp_path / "run"), weights(plain))
    assert (
        "**Not met** within 5 of at most 5 meta-steps"
        in (tmp_path / "run" / "report.md").read_text()
    )
    assert ", out of meta-steps" in capsys.readouterr().out
    starts = json.loads((tmp_path / "run" / "provenance.json").read_text())["starts"]
    assert [start["meta_step"] for start in starts] == [0, step, step]
    assert [start["options"]["until"] for start in starts] == [requirement] * 2 + ["accuracy>=1"]
    assert "## Starts" in (tmp_path / "run" / "report.md").read_text()


def test_a_requirement_that_comes_later_is_told_by_itself(plain, csv_file, encoder, tmp_path):
    """The run's log knows nothing of it."""
    shutil.copytree(plain, tmp_path / "run")
    command = meta_train(csv_file, encoder, tmp_path / "run", *EVERY, "--until", "loss@2<1000")
    assert run([*command, "--resume"]) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "**Met at meta-step 5**" in report and "| no " not in report


def test_an_untrained_rule_may_do(csv_file, encoder, tmp_path):
    command = meta_train(csv_file, encoder, tmp_path / "run", "--until", "loss@2<1000")
    assert run(command) == 0
    assert run([*command, "--resume"]) == 0
    assert [record["meta_step"] for record in records(tmp_path / "run")] == [0]


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ("f1>=0.5", "no metric 'f1'; choose from accuracy, loss"),
        ("accuracy@3>=0.5", "budget @3 must lie between 1 and 2"),
        ("accuracy@0>=0.5", "budget @0 must lie between 1 and 2"),
        ("", "can't read ''"),
    ],
)
def test_a_requirement_that_meta_training_can_not_check(
    csv_file, encoder, tmp_path, capsys, until, message
):
    command = meta_train(csv_file, encoder, tmp_path / "run", "--until", until)
    assert message in fails(command, capsys)
    assert not (tmp_path / "run").exists()


def test_sources_are_told_before_meta_training_and_weights_belong_to_the_run(
    csv_file, encoder, tmp_path, capsys
):
    second = tmp_path / "second.csv"
    rows = [f"{w} number {i} of {c},kind{c}" for c in range(12) for i, w in enumerate("abcdefgh")]
    second.write_text("text,label\n" + "\n".join(rows) + "\n")
    folder = tmp_path / "run"
    command = meta_train(f"{csv_file}=3", encoder, folder)
    command.insert(2, second)
    assert run(command) == 0
    out = capsys.readouterr().out
    assert "things" in out.split("meta-step 0")[0]
    assert f"| {second}" in out.split("meta-step 0")[0]
    facts = json.loads((folder / "run.json").read_text())
    assert facts["domain_weights"] == {"things": 3.0, "second": 1.0}
    command[3] = f"{csv_file}=2"
    assert "domain_weights: " in fails([*command, "--resume"], capsys)
    told = json.loads((folder / "provenance.json").read_text())
    assert [source["weight"] for source in told["data"]["sources"]] == [1.0, 3.0]
    assert set(told["starts"][0]["versions"]) >= {"python", "torch", "transformers", "rnnopt"}


def test_compare_has_no_use_for_weights(csv_file, encoder, adam_rule, tmp_path, capsys):
    command = compare(f"{csv_file}=2", encoder, adam_rule, tmp_path / "o.json")
    assert "compare draws from every domain alike; leave the weight out" in fails(command, capsys)


# -- adapt


@pytest.fixture
def adapting(encoder):
    classifier = Classifier.load(encoder, tune="full", ways=2, device=torch.device("cpu"))
    texts = tuple(f"{word} {i}" for i in range(4) for word in ("play jazz", "set an alarm"))
    labels = np.array([0, 1] * 4)
    corpus = Corpus(texts, tuple(map(str, labels)), ("d",) * 8)
    return classifier, corpus, labels


def watched(adapting, requirement, lr, steps, every=1):
    """Adapt by Adam and watch; the watch, what it said, the number of steps."""
    classifier, corpus, labels = adapting
    params = [param for _, param in classifier.trainable()]
    said = []
    parsed = Requirement.parse(requirement, ("accuracy", "loss"))
    watch = Watch(classifier, corpus, labels, parsed, every, steps, said.append)
    losses = fit(
        classifier, LearnedOptimizer(params, Adam(lr)), corpus.texts, labels,
        steps=steps, batch_size=8, seed=0, tick=lambda loss: watch(),
    )  # fmt: skip
    return watch, said, len(losses)


def test_adaptation_stops_at_the_first_judgement_that_meets_the_requirement(adapting):
    watch, said, steps = watched(adapting, "loss<0.6", 0.003, 50, every=3)
    losses = [check["loss"] for check in watch.checks]
    assert [check["step"] for check in watch.checks] == list(range(3, steps + 1, 3))
    assert min(losses[:-1]) >= 0.6 > losses[-1]
    assert watch.met_step == watch.kept_step == steps < 50
    assert len(said) == len(losses)
    assert said[-1].endswith(": met, stop")


def test_what_came_closest_is_kept_where_the_requirement_is_not_met(adapting):
    classifier, corpus, labels = adapting
    watch, said, steps = watched(adapting, "loss<0.000001", 0.1, 6)  # a rate that overshoots
    losses = [check["loss"] for check in watch.checks]
    assert (steps, watch.met_step) == (6, None)
    assert watch.kept_step == 1 + int(np.argmin(losses))
    assert watch.kept_step != 6  # or the next line would show nothing
    watch.restore()
    assert judge_texts(classifier, corpus.texts, labels).figures() == {
        name: value for name, value in watch.checks[watch.kept_step - 1].items() if name != "step"
    }
    assert said[-1].endswith(": not met, out of steps")


def test_of_judgements_alike_the_first_is_kept(adapting):
    watch, _, _ = watched(adapting, "loss<0.000001", 1e-9, 3)
    assert len({check["loss"] for check in watch.checks}) == 1
    assert watch.kept_step == 1


def test_the_last_step_is_judged_whatever_the_interval(adapting):
    watch, _, _ = watched(adapting, "loss<0.000001", 0.01, 5, every=3)
    assert [check["step"] for check in watch.checks] == [3, 5]


def test_a_judgement_is_that_of_its_confusion_matrix(adapting):
    classifier, corpus, labels = adapting
    judged = judge_texts(classifier, corpus.texts, labels)
    with torch.no_grad():
        logits = classifier.logits(classifier.batch(corpus.texts))
    expected = confusion_matrix(logits.argmax(1).numpy(), labels, 2)
    assert (judged.matrix == expected).all()
    assert judged.metrics.accuracy == expected.trace() / 8
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    assert judged.loss == pytest.approx(float(loss), rel=1e-5)


def test_the_rows_of_a_confusion_matrix_are_the_actual_classes():
    matrix = confusion_matrix(np.array([0, 1, 1]), np.array([0, 0, 1]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_adapt_until_it_is_met(csv_file, encoder, adam_rule, tmp_path, capsys):
    folder = tmp_path / "out"
    command = adapt(csv_file, encoder, folder, "--rule", adam_rule, "--until", "accuracy>=0.05")
    assert run(command) == 0
    result = json.loads((folder / "adapt.json").read_text())
    asked = result["requirement"]
    assert asked["met"]
    assert asked["until"] == "accuracy>=0.05"
    assert asked["met_step"] == asked["kept_step"] == result["steps"] == len(asked["checks"])
    assert np.array(result["confusion"]).sum() == result["texts"] == 50
    assert result["accuracy"] == asked["checks"][-1]["accuracy"]
    out = capsys.readouterr().out
    assert "| actual \\ predicted | food" in out
    assert "**Met after" in (folder / "report.md").read_text()


def test_adapt_that_falls_short_saves_the_classifier_and_exits_with_3(
    csv_file, encoder, adam_rule, tmp_path
):  # fmt: skip
    import transformers

    folder = tmp_path / "out"
    more = ["--until", "accuracy>=1", "--max-steps", "2", "--held-out", "0.5", "--rule", adam_rule]
    assert run(adapt(csv_file, encoder, folder, *more)) == NOT_MET
    result = json.loads((folder / "adapt.json").read_text())
    assert (result["texts"], result["steps"], result["requirement"]["met"]) == (120, 2, False)
    assert transformers.pipeline("text-classification", str(folder))("rain")
    assert "**Not met**" in (folder / "report.md").read_text()


def test_the_test_file_is_read_when_all_else_is_done(
    csv_file, encoder, adam_rule, tmp_path, capsys
):  # fmt: skip
    test = tmp_path / "test.csv"
    test.write_text("text,label\nno such label,unheard of\n")
    more = ["--test", test, "--until", "accuracy>=0.01", "--rule", adam_rule]
    message = fails(adapt(csv_file, encoder, tmp_path / "a", *more), capsys)
    assert "label 'unheard of'" in message and "the classifier is saved in" in message
    assert "**Met after" in (tmp_path / "a" / "report.md").read_text()
    assert (tmp_path / "a" / "provenance.json").exists()
    saved = json.loads((tmp_path / "a" / "adapt.json").read_text())
    assert (tmp_path / "a" / "model.safetensors").exists()
    rows = csv_file.read_text().splitlines()
    test.write_text("\n".join([rows[0], "some new rain,weather", "a good song,music", rows[1]]))
    assert run(adapt(csv_file, encoder, tmp_path / "b", *more)) == 0
    result = json.loads((tmp_path / "b" / "adapt.json").read_text())
    assert result["test"]["texts"] == 2  # the third stands in --data
    assert "since they are in --data: 1 texts" in capsys.readouterr().out
    # nothing in the file has a say in anything else
    for name in ("accuracy", "losses", "requirement", "confusion"):
        assert result[name] == saved[name]
    assert (
        "The test file, read when all else was done" in (tmp_path / "b" / "report.md").read_text()
    )


def test_a_test_file_that_is_not_there_is_found_at_once(csv_file, encoder, tmp_path, capsys):
    more = ["--until", "accuracy>=0.5", "--test", tmp_path / "absent.csv"]
    message = fails(adapt(csv_file, encoder, tmp_path / "out", *more), capsys)
    assert "absent.csv: no such file; check the path of --test" in message
    assert not (tmp_path / "out").exists()


def test_a_test_file_with_nothing_new_is_refused(tmp_path):
    test = tmp_path / "test.csv"
    test.write_text("text,label\nOne  text,a\n")
    columns, nothing = SimpleNamespace(text_column="text", label_column="label"), Corpus((), (), ())
    with pytest.raises(InputError, match="all of its 1 texts are in --data too"):
        judge_unseen(columns, str(test), None, Corpus(("one text",), ("a",), ("d",)), nothing)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--until", "speed>1"], "no metric 'speed'; choose from accuracy, precision, recall"),
        (["--until", "accuracy@5>=0.9"], "budget @5: this command checks the newest step only"),
        (["--until", "accuracy>=0.9", "--max-steps", "0"], "--steps 0: must be at least 1"),
        (["--until", "f1>0.9", "--validate-every", "0"], "--validate-every 0: must be at least 1"),
        (["--held-out", "0"], "--held-out 0.0: must lie between 0 and 1"),
        (["--held-out", "1.5"], "--held-out 1.5: must lie between 0 and 1"),
    ],
)
def test_bad_options_of_adapt_until(csv_file, encoder, tmp_path, capsys, more, message):
    assert message in fails(adapt(csv_file, encoder, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out").exists()


# -- what a rule has seen


def test_adapt_refuses_what_the_rule_was_meta_trained_on(csv_file, encoder, tmp_path, capsys):
    splits = read_splits([csv_file])
    save_rule(random_lstm(), tmp_path / "rule", {"classes": class_sketches(splits.train)})
    more = ["--rule", tmp_path / "rule"]
    message = fails(adapt(csv_file, encoder, tmp_path / "out", *more), capsys)
    assert "of the rule or the initial values, has seen the domain 'things'" in message
    assert "--allow-overlap" in message
    other = tmp_path / "other.csv"  # the same texts and labels under another name
    other.write_bytes(csv_file.read_bytes())
    message = fails(adapt(other, encoder, tmp_path / "out", *more), capsys)
    assert "has seen classes (things/" in message
    assert not (tmp_path / "out").exists()
    assert run(adapt(csv_file, encoder, tmp_path / "out", *more, "--allow-overlap")) == 0
    report = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert report[2].startswith("> **Overlap**: meta-training has seen the domain things")


def test_a_domain_is_the_folder_of_a_file_called_train(csv_file, encoder, tmp_path, capsys):
    (tmp_path / "mail").mkdir()
    data = tmp_path / "mail" / "train.csv"
    data.write_bytes(csv_file.read_bytes())
    save_rule(random_lstm(), tmp_path / "rule", {"validation_classes": {"mail/spam": []}})
    command = adapt(data, encoder, tmp_path / "out", "--rule", tmp_path / "rule")
    assert "has seen the domain 'mail'," in fails(command, capsys)


# -- the report


def test_a_report_is_made_of_the_folder_alone(plain, capsys):
    before = {name: (plain / name).read_bytes() for name in ("report.md", "learning.png")}
    for name in before:
        (plain / name).unlink()
    assert run(["report", plain]) == 0
    assert capsys.readouterr().out.strip() == str(plain / "report.md")
    assert {name: (plain / name).read_bytes() for name in before} == before
    text = before["report.md"].decode()
    for fact in ("--meta-lr", "torch", "fingerprint", "things.csv", "--seed", "learning.png"):
        assert fact.lower() in text.lower()
    assert "Overlap" not in text


def test_a_comparison_has_its_report_beside_it(csv_file, encoder, tmp_path):
    splits = read_splits([csv_file])
    save_rule(random_lstm(), tmp_path / "rule", {"classes": class_sketches(splits.test)})
    out = tmp_path / "o.json"
    assert run([*compare(csv_file, encoder, tmp_path / "rule", out), "--allow-overlap"]) == 0
    report = tmp_path / "o.json.md"
    before = report.read_bytes()
    top = before.decode().splitlines()
    assert top[2] == "> **Overlap**: meta-training has seen the domain things."
    assert top[3].startswith("> **Overlap**: meta-training has seen 2 of the classes")
    assert "| learned" in before.decode()
    report.unlink()
    assert run(["report", out]) == 0
    assert report.read_bytes() == before


def test_without_matplotlib_a_report_has_no_pictures_and_says_so(plain):
    code = "import sys; sys.modules['matplotlib'] = None; from rnnopt.cli.main import main; "
    code += f"sys.exit(main(['report', {str(plain)!r}]))"
    before = (plain / "report.md").read_bytes()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no pictures, matplotlib is missing" in done.stdout
    assert b"learning.png" not in (plain / "report.md").read_bytes()
    (plain / "report.md").write_bytes(before)


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_a_report_of_what_is_no_run(tmp_path, capsys, content):
    if content is None:
        assert "no run is there" in fails(["report", tmp_path], capsys)
        return
    for name in ("run.json", "result.json"):
        (tmp_path / name).write_text(content)
    for path in (tmp_path, tmp_path / "result.json"):
        assert "damaged" in fails(["report", path], capsys)
    assert not (tmp_path / "report.md").exists()

"""`TextClassifier`: the habits of scikit-learn, and never worse than its own start."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from encoders import TEXTS, tiny_bert, tiny_distilbert, tiny_roberta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score

from rnnopt import TextClassifier
from rnnopt.errors import InputError
from rnnopt.rules.classical import AdamW
from rnnopt.tasks.text.encoder.sentence import Layout, SentenceEncoder
from rnnopt.tasks.text.estimator import adaptation, evidence
from rnnopt.tasks.text.estimator.evidence import (
    Labelled,
    choose_start,
    weights_of,
)
from rnnopt.tasks.text.estimator.figures import (
    Figures,
    expected_calibration_error,
    wilson_interval,
)
from rnnopt.tasks.text.estimator.heads import (
    best_temperature,
    class_mean_head,
    log_softmax,
    logistic_head,
)
from rnnopt.tasks.text.estimator.objective.one_label import stratified_folds
from rnnopt.tasks.text.estimator.steps import Plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few(texts):
    """Three classes of four texts, and the labels."""
    chosen = [pair for label in ("food", "music", "work") for pair in texts if pair[1] == label]
    rows = [chosen[24 * label + 5 * i] for label in range(3) for i in range(4)]
    return [text for text, _ in rows], [label for _, label in rows]


@pytest.fixture(scope="module")
def fitted(encoder, few):
    return TextClassifier(encoder, steps=2, seconds=None, device="cpu").fit(*few)


@pytest.fixture(scope="module")
def more(texts):
    """Three classes of twelve texts, and the labels."""
    rows = [(text, label) for text, label in texts if label in ("food", "music", "work")][::2]
    return [text for text, _ in rows], [label for _, label in rows]


@pytest.fixture(scope="module")
def adapted(encoder, more):
    """A classifier whose adaptation was kept: from a start that is too timid to be good."""
    classifier = TextClassifier(
        encoder, rule=AdamW(step_size=3e-2), steps=20, seconds=None, device="cpu"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "INVERSE_PENALTIES", (1.0,))
        classifier.fit(*more)
    assert classifier.report_.kept.endswith("of adaptation")
    return classifier


def sentence_folder(folder, texts, layout):
    tiny_bert(folder, texts)
    layout.write(folder, 32)
    return folder


# -- habits of scikit-learn


def test_fit_returns_the_classifier_and_stores_what_it_found(fitted, few):
    assert fitted.classes_.tolist() == ["food", "music", "work"]
    assert fitted.fit(*few) is fitted
    assert set(fitted.predict(few[0])) <= set(few[1])
    assert fitted.report_.texts == 12 and fitted.report_.classes == 3


def test_the_constructor_stores_settings_alone(encoder):
    classifier = TextClassifier(encoder, steps=-1)  # refused by fit
    assert classifier.get_params()["steps"] == -1
    assert classifier.set_params(steps=3).steps == 3
    assert clone(classifier).get_params() == classifier.get_params()
    assert is_classifier(classifier)


def test_scikit_learn_cross_validates_it(encoder, few):
    scores = cross_val_score(TextClassifier(encoder, steps=0, device="cpu"), *few, cv=2)
    assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()


def test_probabilities_are_probabilities(fitted, few):
    probabilities = fitted.predict_proba(few[0])
    assert probabilities.shape == (12, 3)
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert (fitted.predict(few[0]) == fitted.classes_[probabilities.argmax(axis=1)]).all()
    assert fitted.score(*few) == (fitted.predict(few[0]) == few[1]).mean()
    assert fitted.predict_proba([]).shape == (0, 3)


def test_the_same_data_gives_the_same_classifier(encoder, more):
    classifier = TextClassifier(encoder, steps=2, seconds=None, device="cpu")
    first = classifier.fit(*more).predict_proba(TEXTS)
    torch.manual_seed(7)  # no matter
    assert (clone(classifier).fit(*more).predict_proba(TEXTS) == first).all()


LABELS = [
    ["a", "b", "a", "b"], [3, -1, 3, -1], [True, False, True, False], ["1", "2", "2", "1"],
    [10, 9, 8, 7], np.array([0, 1, 0, 1]), np.array(["x", "y", "y", "x"]), ["é", "ü", "é", "ü"],
]  # fmt: skip


@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_labels_of_any_kind_come_back_as_they_were(labels, encoder, tmp_path):
    classifier = TextClassifier(encoder, steps=0, device="cpu").fit(TEXTS[:4], labels)
    classifier.save(tmp_path / "saved")
    for one in (classifier, TextClassifier.load(tmp_path / "saved", device="cpu")):
        assert one.predict(TEXTS[:4]).tolist() == list(labels)
        assert one.classes_.dtype == np.array(labels).dtype


@given(order=st.permutations(range(len(TEXTS))))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_permuted_texts_have_permuted_answers_to_the_bit(fitted, order):
    there = fitted.predict_proba(TEXTS)
    assert (fitted.predict_proba([TEXTS[i] for i in order]) == there[list(order)]).all()


def test_a_text_that_is_unlikely_to_belong_anywhere_gets_no_label(fitted, few):
    best = fitted.predict_proba(few[0]).max(axis=1)
    careful = fitted.set_params(abstain_below=float(np.median(best)))
    answers = careful.predict(few[0])
    fitted.set_params(abstain_below=None)
    assert [answer is None for answer in answers] == (best < np.median(best)).tolist()


def test_a_class_weighs_as_much_as_is_said(encoder, few, tmp_path):
    weights = weights_of(np.array([0, 0, 1, 2]), {"b": 6}, ["a", "b", "c"])
    assert np.allclose(weights, np.array([1, 1, 6, 1]) / 2.25)
    plain, heavy = (
        TextClassifier(encoder, steps=0, class_weight=given, device="cpu").fit(*few)
        for given in (None, {"food": 50.0})
    )
    shares = [one.predict_proba(few[0])[:, 0].mean() for one in (plain, heavy)]
    assert shares[1] > shares[0]
    heavy.save(tmp_path / "heavy")
    loaded = TextClassifier.load(tmp_path / "heavy")
    assert np.array_equal(loaded.predict_proba(few[0]), heavy.predict_proba(few[0]))
    assert loaded.class_weight == {"food": 50.0}


def test_balanced_classes_count_alike():
    labels = np.array([0] * 6 + [1] * 2)
    assert weights_of(labels, "balanced").tolist() == [8 / 12] * 6 + [8 / 4] * 2
    assert weights_of(labels, None).tolist() == [1] * 8


def test_a_hundred_classes_and_one_text_a_class(encoder, texts):
    many = [text for text, _ in texts][:200]
    classifier = TextClassifier(encoder, device="cpu").fit(many[:100], list(range(100)))
    assert classifier.score(many[:100], list(range(100))) > 0.9
    assert "every label has one text" in classifier.report_.reason
    assert classifier.report_.accuracy is None


@pytest.mark.parametrize("shots", [1, 2])
def test_150_classes_are_never_worse_than_the_start(shots, encoder):
    words = [f"thing number {i} {'please' if j else 'now'}" for i in range(150) for j in range(2)]
    rows = [2 * i + j for i in range(150) for j in range(shots)]
    classifier = TextClassifier(
        encoder, rule=AdamW(step_size=1e-2), steps=2, seconds=None, device="cpu"
    ).fit([words[i] for i in rows], [i // 2 for i in rows])
    report = classifier.report_
    assert (report.classes, report.texts) == (150, 150 * shots)
    assert report.memory > 1e8 and f"at most {report.memory / 1e6:.0f} MB" in str(report)
    if shots == 1:
        assert report.accuracy is None and "none can be held out" in report.reason
    else:
        assert report.log_loss <= report.tried[0].log_loss
        assert report.accuracy >= report.tried[0].accuracy or "adaptation" not in report.kept
    assert np.allclose(classifier.predict_proba(words[:5]).sum(axis=1), 1)


def test_evaluation_by_texts_that_it_was_fitted_on_is_told(fitted, few, tmp_path):
    fitted.save(tmp_path / "saved")
    again = TextClassifier.load(tmp_path / "saved", device="cpu")
    shouted = [f"  {few[0][0].upper()}", "a text of mine", "another of mine"]
    for one in (fitted, again):
        with pytest.warns(UserWarning, match="1 of the 3 texts to judge by stand among .*leave"):
            figures = one.evaluate(shouted, few[1][:3])
        assert figures.known == 1 and "it was fitted on 1 of these texts" in str(figures)
        assert one.evaluate(shouted[1:], few[1][:2]).known == 0
    assert few[0][0] not in (tmp_path / "saved" / "classifier.json").read_text()


def test_the_lines_of_the_guide_run(encoder, few, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "classifier.md").read_text()
    blocks = [block[7:] for block in page.split("```") if block.startswith("python\n")]
    first, (save,) = blocks[0], [block for block in blocks if "classifier.save(" in block]
    hub = '"sentence-transformers/all-MiniLM-L6-v2"'
    assert hub in first and len(first.strip().splitlines()) == 4  # three and a blank
    monkeypatch.chdir(tmp_path)
    names = {"encoder": encoder, "texts": few[0], "labels": few[1]}
    exec(first.replace(hub, "encoder") + save, names)
    again = TextClassifier.load(tmp_path / "classifier", device="cpu")
    assert (again.predict(TEXTS) == names["classifier"].predict(TEXTS)).all()
    (several,) = [block for block in blocks if '["billing", "refund"]' in block]
    (abstain,) = [block for block in blocks if "abstain=0.05" in block]
    exec(abstain.replace("(encoder", "(encoder, steps=0"), names)
    names["texts"] = TEXTS[:3]
    exec(several.replace("(encoder", "(encoder, steps=0"), names)
    assert names["classifier"].classes_.tolist() == ["billing", "refund"]


# -- evidence


@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=30),
    folds=st.integers(2, 5),
    seed=st.integers(0, 9),
)
def test_folds_hold_out_every_text_once_and_fit_on_every_class(labels, folds, seed):
    places = np.unique(labels, return_inverse=True)[1]
    counts = np.bincount(places)
    made = stratified_folds(places, folds, seed)
    held = sorted(int(i) for _, part in made for i in part)
    assert held == [i for i in range(len(labels)) if counts[places[i]] > 1]
    assert len(made) <= folds
    for known, part in made:
        assert not set(known) & set(part) and len(known) + len(part) == len(labels)
        assert set(places[known]) == set(places)


def test_the_start_is_the_default_unless_something_else_is_better():
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    embeddings = np.eye(8)[labels] + 0.4 * generator.normal(size=(60, 8))
    start = choose_start(Labelled(embeddings, labels, np.ones(60)), seed=0)
    assert len(start.tried) == 6 and start.evidence.accuracy > 0.8
    assert start.name == start.tried[0].name
    # 500 columns of noise: strong penalties are better than the default
    noisy = np.concatenate([embeddings, 0.3 * generator.normal(size=(60, 500))], axis=1)
    start = choose_start(Labelled(noisy, labels, np.ones(60)), seed=0)
    assert start.evidence.log_loss <= start.tried[0].log_loss


def test_better_by_chance_is_not_better():
    losses = np.array([1.0, 0.2, 0.7, 0.4])

    def judged(losses):
        found = evidence.Evidence("", 1, losses.mean(), 1)
        return evidence.Judged(found, losses, np.ones(4), np.zeros((4, 2)), np.zeros(4, int))

    once = judged(losses - np.array([0.3, 0, 0, 0]))  # the mean is lower, by one text of four
    assert not once.better_than(judged(losses), 2) and once.better_than(judged(losses), 0)
    assert judged(losses - np.array([0.3, 0.1, 0.2, 0.2])).better_than(judged(losses), 2)
    assert not judged(losses).better_than(judged(losses), 2)


@pytest.mark.parametrize("ways", [2, 5])
def test_class_means_make_the_nearest_mean_the_likeliest(ways):
    generator = np.random.default_rng(0)
    labels = np.arange(20) % ways
    rows, query = generator.normal(size=(20, 6)), generator.normal(size=(50, 6))
    means = np.stack([rows[labels == label].mean(axis=0) for label in range(ways)])
    nearest = np.square(query[:, None] - means).sum(axis=2)
    logits = class_mean_head(rows, labels).logits(query)
    assert (logits.argmax(axis=1) == nearest.argmin(axis=1)).all()
    differences = logits + nearest / np.square(rows - rows.mean(axis=0)).sum(axis=1).mean()
    assert np.allclose(differences, differences[:, :1])


@pytest.mark.parametrize("ways", [2, 4])
def test_logistic_regression_is_at_its_minimum(ways):
    """Its gradient, with the penalty's, is zero: also with two classes, and at any scale."""
    generator = np.random.default_rng(0)
    labels, rows = np.arange(24) % ways, 7 * generator.normal(size=(24, 5)) + 3
    weights = generator.uniform(0.5, 2, size=24)
    head = logistic_head(rows, labels, weights, 10.0)
    centre = rows.mean(axis=0)
    variance = np.square(rows - centre).sum(axis=1).mean()
    weight = torch.tensor(head.weight, requires_grad=True)
    logits = torch.from_numpy(rows - centre) @ weight.T + torch.tensor(
        head.bias + head.weight @ centre
    )
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
    total = (torch.from_numpy(weights) * losses).sum() + weight.square().sum() * variance / 20
    (gradient,) = torch.autograd.grad(total, weight)
    assert float(gradient.abs().max()) < 1e-2 * float(weight.detach().abs().max()) * variance


def test_temperature_is_the_one_that_made_the_logits():
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(4000, 4))
    chances = np.exp(log_softmax(logits))
    labels = (chances.cumsum(axis=1) < generator.uniform(size=(4000, 1))).sum(axis=1)
    assert best_temperature(3 * logits, labels, np.ones(4000)) == pytest.approx(3, rel=0.1)


def test_a_few_right_answers_do_not_make_it_sure():
    logits = np.array([[1.0, 0.0], [0.0, 1.0]])
    temperature = best_temperature(logits, np.array([0, 1]), np.ones(2))
    assert np.exp(log_softmax(logits / temperature))[0, 0] == pytest.approx(0.75, abs=0.01)


# -- adaptation, and its safety net


def started(report):
    """The evidence for what adaptation started from."""
    return [e for e in report.tried if not e.name.endswith("of adaptation")]


def test_it_is_never_worse_than_its_own_start_by_its_own_evidence(adapted):
    report = adapted.report_
    (kept,) = [e for e in report.tried if e.name == report.kept]
    assert (report.accuracy, report.log_loss) == (kept.accuracy, kept.log_loss)
    best = min(started(report), key=lambda e: e.log_loss)
    assert report.accuracy > best.accuracy and report.log_loss < best.log_loss


@given(lr=st.sampled_from([1e-5, 1e-2, 1.0, 1e3]), seed=st.integers(0, 3))
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_the_rule_does_the_evidence_is_not_worse(encoder, more, lr, seed):
    classifier = TextClassifier(
        encoder, rule=AdamW(step_size=lr), steps=3, seconds=None, random_state=seed, device="cpu"
    ).fit(*more)
    first = started(classifier.report_)[0]
    assert classifier.report_.log_loss <= first.log_loss
    assert classifier.report_.accuracy >= first.accuracy or classifier.report_.kept != first.name
    assert np.isfinite(classifier.predict_proba(TEXTS)).all()


def test_a_rule_that_does_harm_leaves_the_encoder_as_it_is_to_the_bit(encoder, few):
    harmful = TextClassifier(
        encoder, rule=AdamW(step_size=1e30), steps=2, seconds=None, device="cpu"
    )
    plain = TextClassifier(encoder, steps=0, device="cpu").fit(*few)
    assert harmful.fit(*few).report_.kept == plain.report_.kept
    assert harmful.report_.reason == "adaptation diverged"
    assert (harmful.predict_proba(few[0]) == plain.predict_proba(few[0])).all()


def test_the_report_says_what_was_kept_and_why(fitted, adapted):
    assert str(adapted.report_).startswith(f"kept {adapted.report_.kept}: has accuracy ")
    assert "logistic regression" in str(fitted.report_) or "class means" in str(fitted.report_)
    assert "12 texts, 3 classes with 4 texts each" in str(fitted.report_)


def test_any_torch_optimizer_can_adapt(encoder, few, tmp_path):
    """AdamW as a rule and as torch's optimizer take the same steps."""
    chosen = {"steps": 3, "seconds": None, "device": "cpu"}
    rule = TextClassifier(encoder, rule=AdamW(step_size=1e-2), **chosen).fit(*few)
    torchs = TextClassifier(
        encoder,
        rule=lambda params: torch.optim.AdamW(params, 1e-2, weight_decay=0.0),
        **chosen,
    ).fit(*few)
    for one, other in zip(rule.report_.tried, torchs.report_.tried):
        assert one.log_loss == pytest.approx(other.log_loss, rel=1e-3)
    torchs.save(tmp_path / "saved")  # the function stays behind
    assert TextClassifier.load(tmp_path / "saved", device="cpu").rule is None


def test_schedule_free_is_judged_by_its_averaged_values(encoder, few):
    schedulefree = pytest.importorskip("schedulefree")
    modes = []

    class Watched(schedulefree.AdamWScheduleFree):
        def eval(self):
            modes.append("eval")
            super().eval()

        def train(self):
            modes.append("train")
            super().train()

    TextClassifier(encoder, rule=lambda p: Watched(p, lr=1e-2), steps=2, seconds=None).fit(*few)
    assert modes[:6] == ["train", "eval", "train", "eval", "train", "train"]


def test_a_function_that_makes_no_optimizer(encoder, few):
    with pytest.raises(InputError, match=r"rule made a int of the parameters; it must make a"):
        TextClassifier(encoder, rule=lambda params: 3, seconds=None, device="cpu").fit(*few)


def test_adaptation_that_would_take_too_long_is_not_begun(encoder, few):
    classifier = TextClassifier(encoder, seconds=0, device="cpu").fit(*few)
    assert "adaptation would take " in classifier.report_.reason
    assert "0 s are allowed; give more seconds" in classifier.report_.reason


def test_folds_are_given_up_before_steps_and_steps_before_adaptation():
    plan = Plan(None, steps=10, lora_rank=None, seconds=30.0, seed=0)
    found = [adaptation.affordable(3, plan, step) for step in (0.66, 0.85, 0.9, 2.1, 4.2, 4.3)]
    assert found == [(3, 10), (2, 10), (2, 9), (2, 4), (2, 2), (0, 0)]
    assert adaptation.affordable(3, replace(plan, seconds=None), 99.0) == (3, 10)
    assert adaptation.affordable(3, replace(plan, steps=1), 8.0) == (2, 1)


def test_a_slow_machine_adapts_in_fewer_steps_and_says_so(encoder, few, monkeypatch):
    monkeypatch.setattr(adaptation.Adaptation, "seconds_per_step", lambda self: 9.0)
    rule = AdamW(step_size=1e-2)
    classifier = TextClassifier(encoder, rule=rule, seconds=100, device="cpu").fit(*few)
    assert classifier.report_.folds == 2
    names = [tried.name for tried in classifier.report_.tried if "steps of" in tried.name]
    assert names == ["2 steps of adaptation", "3 steps of adaptation"]
    assert classifier.report_.reason.endswith("; for more than 3 steps give more seconds")


def test_adaptation_that_takes_longer_than_foreseen_is_broken_off(encoder, few, monkeypatch):
    monkeypatch.setattr(adaptation.Adaptation, "seconds_per_step", lambda self: 0.0)
    classifier = TextClassifier(encoder, seconds=1e-6, device="cpu").fit(*few)
    assert "took longer than the 1e-06 s" in classifier.report_.reason
    plain = TextClassifier(encoder, steps=0, device="cpu").fit(*few)
    assert (classifier.predict_proba(few[0]) == plain.predict_proba(few[0])).all()


@pytest.mark.parametrize("make", [tiny_distilbert, tiny_roberta])
def test_other_architectures(make, few, tmp_path):
    folder = make(tmp_path / "encoder")
    classifier = TextClassifier(
        folder, rule=AdamW(step_size=1e-2), steps=3, seconds=None, device="cpu"
    )
    classifier.fit(*few).save(tmp_path / "saved")
    again = TextClassifier.load(tmp_path / "saved", device="cpu")
    assert (again.predict_proba(few[0]) == classifier.predict_proba(few[0])).all()


# -- pooling


def test_pooling_is_what_the_encoder_was_trained_for(few, tmp_path):
    layout = Layout("cls", True, 16, "")
    folder = sentence_folder(tmp_path / "encoder", few[0], layout)
    encoder = SentenceEncoder.load(folder, CPU)
    assert encoder.layout.pooling == "cls" and encoder.layout.max_length == 16
    vectors = encoder.embed(few[0])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(12))
    model = transformers.AutoModel.from_pretrained(folder)
    inputs = encoder.tokenizer(few[0][0], return_tensors="pt")
    with torch.no_grad():
        first = model(**inputs).last_hidden_state[0, 0]
    assert torch.allclose(vectors[0], first / first.norm(), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_reach_the_vectors(pooling, side, encoder):
    loaded = SentenceEncoder.load(encoder, CPU, pooling)
    alone = torch.cat([loaded.embed([text]) for text in TEXTS])
    if side == "right":  # BERT counts positions from the left, padding or not
        assert torch.allclose(loaded.embed(TEXTS), alone, atol=1e-5)
    else:
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        states = torch.arange(18.0).view(2, 3, 3)
        loaded.encoder.forward = lambda **batch: type("Out", (), {"last_hidden_state": states})
        made = loaded({"attention_mask": mask})[0]
        wanted = {"mean": 4.5, "cls": 3, "max": 6, "last": 6}[pooling]
        assert made.tolist() == [wanted, wanted + 1, wanted + 2]


def test_another_pooling_leaves_the_length_of_texts_as_it_is(few, tmp_path):
    folder = sentence_folder(tmp_path / "encoder", few[0], Layout("mean", True, 16, ""))
    layout = SentenceEncoder.load(folder, CPU, "cls").layout
    assert (layout.pooling, layout.normalized, layout.max_length) == ("cls", True, 16)


def test_a_layout_comes_back_from_its_files(tmp_path):
    for number, layout in enumerate([Layout("mean", True, 64, ""), Layout("last", False, 9, "")]):
        folder = tmp_path / str(number)
        layout.write(folder, 8)
        found = Layout.read(folder)
        assert (found.pooling, found.normalized, found.max_length) == (
            layout.pooling, layout.normalized, layout.max_length
        )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode": "lasttoken", "include_prompt": True}, "last"),  # version 6
        ({"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, None),
        ({"pooling_mode": "weightedmean"}, None),
        ({"pooling_mode": ["cls", "max"]}, None),
    ],
)
def test_both_formats_of_sentence_transformers_are_read(config, pooling, tmp_path):
    """The files are those that its versions 3 and 6.2 write."""
    Layout("mean", False, 16, "").write(tmp_path, 8)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if pooling is None:
        with pytest.raises(InputError, match=r"asks for the pooling .* give pooling='mean'"):
            Layout.read(tmp_path)
    else:
        assert Layout.read(tmp_path).pooling == pooling


@pytest.mark.parametrize("content", ["{}", "[1]", "3", "{"])
def test_files_that_say_nothing_are_as_if_they_were_not_there(content, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (tmp_path / name).write_text(content)
    assert Layout.read(tmp_path) == Layout("mean", False, 256, "the encoder's files name none")
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": "x"}')
    assert Layout.read(tmp_path).max_length == 256


def test_a_module_that_is_not_supported_is_refused(few, tmp_path):
    folder = sentence_folder(tmp_path / "e", few[0], Layout("mean", False, 16, ""))
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"has a module Dense, and only .*give pooling='mean'"):
        TextClassifier(folder, device="cpu").fit(*few)
    TextClassifier(folder, pooling="mean", steps=0, device="cpu").fit(*few)


# -- folders


def test_a_saved_classifier_gives_the_same_probabilities_to_the_bit(adapted, tmp_path):
    adapted.save(tmp_path / "saved")
    again = TextClassifier.load(tmp_path / "saved", device="cpu")
    assert (again.predict_proba(TEXTS) == adapted.predict_proba(TEXTS)).all()
    assert again.report_ == adapted.report_
    assert again.steps == adapted.steps
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "head.safetensors", "modules.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pkl", ".py"))]
    card = (tmp_path / "saved" / "README.md").read_text()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").rglob("*.*")}
    assert modes == {0o644}  # a service under another user can read it
    assert adapted.report_.data in card and adapted.report_.kept in card and "Limits" in card


def test_a_saved_classifier_is_an_encoder(adapted, few, tmp_path):
    adapted.save(tmp_path / "saved")
    TextClassifier(tmp_path / "saved", steps=0, device="cpu").fit(*few)


def test_nothing_that_was_saved_is_overwritten(fitted, tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    fitted.save(folder)  # empty
    with pytest.raises(InputError, match="has something in it, and nothing is overwritten; choose"):
        fitted.save(folder)


def test_a_folder_appears_whole_or_not_at_all(fitted, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("rnnopt.tasks.text.estimator.folder.card", fail)
    with pytest.raises(InputError, match=r"can't write .*disk full; choose another"):
        fitted.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_classifier_is_refused(encoder, fitted, tmp_path):
    with pytest.raises(InputError, match=r"is no classifier: it has no classifier.json; give"):
        TextClassifier.load(encoder)
    fitted.save(tmp_path / "saved")
    path = tmp_path / "saved" / "classifier.json"
    saved = path.read_text()
    path.write_text(saved.replace('"format": 2', '"format": 9'))
    with pytest.raises(InputError, match="has format 9, and this rnnopt reads 2; fit the"):
        TextClassifier.load(tmp_path / "saved")
    path.write_text('{"format": 2}')
    with pytest.raises(InputError, match="do not hold what they should"):
        TextClassifier.load(tmp_path / "saved")
    facts = json.loads(saved)
    for name, value in (
        ("classes", None), ("floor", "x"), ("thresholds", ["a"]), ("settings", "ab"), ("known", 3),
    ):  # fmt: skip
        path.write_text(json.dumps({**facts, name: value}))
        with pytest.raises(InputError, match=r"do not hold what .*fit the classifier"):
            TextClassifier.load(tmp_path / "saved")


# -- bad input


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], [], "there are 0 texts; give at least two"),
        (["a", "b"], ["x", "x"], "all 2 labels are 'x'; a classifier needs .* add texts"),
        (["a", None], ["x", "y"], "text 1 is None, of type NoneType; every text must be a string"),
        (["a", 3.0], ["x", "y"], "text 1 is 3.0, of type float; .* leave it out with its label"),
        ("a text", ["x"], "texts is one string, 'a text'; a list of texts is needed"),
        ({"a": 1, "b": 2}, ["x", "y"], "texts is {'a': 1, 'b': 2}, of type dict; give a list"),
        ({"a"}, ["x"], "texts is {'a'}, of type set; give a list"),
        (["a", "b"], {"x": 1, "y": 2}, "labels is {'x': 1, 'y': 2}, of type dict; give a list"),
        (5, ["x"], "texts is 5, of type int; give a list of texts"),
        (["a", "\ud800"], ["x", "y"], "half a surrogate pair, .* delete"),
        (["a", "b"], ["x"], "2 texts and 1 labels; give each text one label"),
        (["a", "b"], ["x", None], "label 1 is None, of type NoneType; labels must be strings"),
        (["a", "b"], [0.5, 1.5], "label 0 is 0.5, of type float; .* convert them"),
        (["a", "b"], [float("nan"), 1], "label 0 is nan, of type float"),
        (["a", "b"], ["x", 1], "label 0 is 'x' and label 1 is 1; all labels must be of one kind"),
        (["a", "b"], [True, 1], "all labels must be of one kind: convert them to strings"),
        (["a", "b"], "xy", "labels is 'xy', of type str; give a list of labels"),
        (
            ["a", "b"],
            [-1, 2**63],
            "label 1 is 9223372036854775808, of more than 64 bits; give labels as",
        ),
        (["a", "b"], ["x", "x\0"], r"label 1 is 'x\\x00', with .* null character .* delete"),
        (["a", "b"], ["x", "\ud800"], "label 1 is .*half a surrogate pair.* delete"),
        (["a", "b"], [["x"], ["\ud800"]], "label 1 is .*half a surrogate pair.* delete"),
    ],
)
def test_texts_and_labels_that_can_not_be_used(rows, labels, message, encoder):
    with pytest.raises(InputError, match=message):
        TextClassifier(encoder).fit(rows, labels)


def test_a_table_is_not_taken_for_its_columns_names(encoder):
    """There are as many columns as labels, so that nothing else would tell."""
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": ["a", "b"], "label": ["x", "y"]})
    classifier = TextClassifier(encoder, steps=0, device="cpu")
    with pytest.raises(InputError, match="texts is a DataFrame with the columns text, label; give"):
        classifier.fit(table, ["x", "y"])
    with pytest.raises(InputError, match="labels is a DataFrame with the columns label; give one"):
        classifier.fit(table["text"], table[["label"]])
    assert classifier.fit(table["text"], table["label"]).classes_.tolist() == ["x", "y"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": -1}, "steps is -1; it must be an integer of at least 0"),
        ({"steps": 1.5}, "steps is 1.5; it must be an integer"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be an integer of at least 1"),
        ({"seconds": -1}, "seconds is -1; it must be at least 0, or None"),
        ({"class_weight": "some"}, "class_weight is 'some'; use None, 'balanced', or a positive"),
        ({"class_weight": {}}, "class_weight is {}; use None, 'balanced', or a positive number"),
        ({"class_weight": {"food": -1}}, "class_weight is {'food': -1}; use None, 'balanced', or"),
        ({"class_weight": {"x": 1}}, "class_weight names 'x', which is none of the 3 labels"),
        ({"abstain_below": 2}, "abstain_below is 2; it is a probability, between 0 and 1"),
        ({"pooling": "sum"}, "pooling is 'sum'; use one of auto, mean, cls, max, last"),
        ({"max_length": 0}, "max_length is 0; it must be an integer of at least 1"),
        ({"max_length": "5"}, "max_length is '5'; it must be an integer"),
        ({"seconds": "5"}, "seconds is '5'; it must be at least 0"),
        ({"abstain": "5"}, "abstain is '5'; it is the share"),
        ({"abstain_below": "5"}, "abstain_below is '5'; it is a probability"),
        ({"encoder": None}, "encoder is None; give a folder that save_pretrained wrote, or a"),
        ({"rule": 1e-3}, "rule is 0.001; give an rnnopt.UpdateRule, the path of a rule file, a"),
        ({"device": "none"}, "device is 'none', and torch can't use it; give 'cpu' or 'auto'"),
        ({"encoder": "no/such folder"}, "there is no folder no/such folder; give a folder"),
        ({"rule": "no.safetensors"}, "no.safetensors"),
    ],
)
def test_settings_that_can_not_be_used(setting, message, encoder, few):
    with pytest.raises(InputError, match=message):
        TextClassifier(**{"encoder": encoder, "seconds": None, **setting}).fit(*few)


def test_a_rule_file_is_read_before_the_encoder(few):
    with pytest.raises(InputError, match=r"can't read no\.safetensors"):
        TextClassifier("no/such folder", rule="no.safetensors").fit(*few)


def test_settings_may_be_numbers_of_numpy(encoder, few, tmp_path):
    """A grid of scikit-learn's often is an array."""
    numbers = {"steps": np.int64(1), "lora_rank": np.int64(2), "random_state": np.int64(3)}
    classifier = TextClassifier(encoder, seconds=None, abstain=np.float32(0.5), **numbers)
    classifier.fit(*few).save(tmp_path / "saved")
    loaded = TextClassifier.load(tmp_path / "saved").get_params()
    assert {name: loaded[name] for name in numbers} == numbers and loaded["abstain"] == 0.5


def test_a_score_needs_texts_and_labels_of_the_same_kind(fitted):
    with pytest.raises(InputError, match="there are 0 texts to judge by; give at least one"):
        fitted.score([], [])
    with pytest.raises(InputError, match="the labels are integers, and the classifier's are str"):
        fitted.score(["a"], [1])
    assert fitted.score(["a"], ["sport"]) == 0


def test_an_encoder_without_a_tokenizer(encoder, few, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    with pytest.raises(InputError, match=r"tokenizer.*save the encoder's tokenizer into the same"):
        TextClassifier(tmp_path).fit(*few)


@pytest.mark.parametrize("method", ["predict", "predict_proba"])
def test_prediction_before_fit(method, encoder, tmp_path):
    for error in (InputError, NotFittedError):
        with pytest.raises(error, match=r"has not been fitted; call fit\(texts, labels\) first"):
            getattr(TextClassifier(encoder), method)(["a"])
    with pytest.raises(NotFittedError):
        TextClassifier(encoder).save(tmp_path / "x")


def test_labels_that_fit_has_not_seen(fitted):
    with pytest.raises(InputError, match=r"label 'sport' is none of the classifier's 3 .strings"):
        fitted.evaluate(["a"], ["sport"])
    with pytest.raises(InputError, match="there are 0 texts to judge by"):
        fitted.evaluate([], [])


# -- figures


def test_wilson_intervals_of_known_cases():
    """Agresti and Coull 1998, and any table: 81 of 263, .2553 to .3662; 0 of 20, 0 to .1611."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_calibration_error_of_known_cases():
    sure = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert expected_calibration_error(sure, np.array([0, 1])) == 0
    assert expected_calibration_error(sure, np.array([1, 0])) == 1
    half = np.array([[0.75, 0.25]] * 4)
    assert expected_calibration_error(half, np.array([0, 0, 0, 1])) == 0
    assert expected_calibration_error(half, np.array([0, 0, 1, 1])) == pytest.approx(0.25)


def test_figures_of_a_known_case():
    figures = Figures.of(np.array([[0.5, 0.5], [0.25, 0.75], [0.25, 0.75]]), np.array([0, 1, 0]))
    assert figures.accuracy == pytest.approx(2 / 3)
    assert figures.macro_f1 == pytest.approx(2 / 3)
    assert figures.log_loss == pytest.approx(-(np.log(0.5) + np.log(0.75) + np.log(0.25)) / 3)
    assert "on 3 texts: accuracy 0.667 (95 % interval 0.208 to 0.939)" in str(figures)


def test_the_optimizer_stays_light():
    code = "import rnnopt, sys; rnnopt.LearnedOptimizer; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_scores_of_scikit_learn_take_two_classes(encoder, few):
    """They would take a `decision_function` of two columns for one of several classes."""
    rows = [(text, label) for text, label in zip(*few) if label != "work"]
    classifier = TextClassifier(encoder, steps=0, device="cpu")
    texts, labels = [text for text, _ in rows], [label == "food" for _, label in rows]
    scores = cross_val_score(classifier, texts, labels, cv=2, scoring="roc_auc")
    assert ((scores >= 0) & (scores <= 1)).all()
    assert classifier.fit(texts, labels).logits(texts).shape == (8, 2)

"""Texts with several labels: sigmoids, thresholds by cross-validation, lists in and lists out."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

from rnnopt import TextClassifier
from rnnopt.data.several import read_several
from rnnopt.errors import InputError
from rnnopt.rules.classical import AdamW
from rnnopt.tasks.text.estimator.figures import Figures
from rnnopt.tasks.text.estimator.heads import one_vs_rest_head
from rnnopt.tasks.text.estimator.objective.several_labels import (
    SeveralLabels,
    best_thresholds,
    iterative_folds,
    micro_macro_f1,
    middle_thresholds,
)

SEVERAL = SeveralLabels()


@pytest.fixture(scope="module")
def pairs(texts):
    """Thirty texts: of one thing, of two things joined, or of none that counts."""
    things = [[text for text, label in texts if label == name] for name in ("food", "music")]
    rest = [text for text, label in texts if label == "work"]
    rows = [(things[0][i], ["food"]) for i in range(10)]
    rows += [(things[1][i], ["music"]) for i in range(8)]
    rows += [(f"{things[0][i]} and {things[1][i]}", ["music", "food"]) for i in range(10, 16)]
    rows += [(rest[i], []) for i in range(6)]
    return [text for text, _ in rows], [label for _, label in rows]


@pytest.fixture(scope="module")
def fitted(encoder, pairs):
    return TextClassifier(encoder, steps=0, device="cpu").fit(*pairs)


def test_lists_of_labels_give_lists_of_labels(fitted, pairs):
    assert fitted.classes_.tolist() == ["food", "music"]
    answers, probabilities = fitted.answer(pairs[0])
    assert answers == fitted.predict(pairs[0])
    assert answers == [fitted.classes_[row >= fitted.thresholds_].tolist() for row in probabilities]
    assert {len(row) for row in answers} == {0, 1, 2}
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert fitted.score(*pairs) == np.mean([a == sorted(b) for a, b in zip(answers, pairs[1])])
    assert fitted.score(*pairs) > 0.8
    assert fitted.predict([]) == []


def test_the_report_has_micro_and_macro_f1_of_texts_held_out(fitted):
    report = fitted.report_
    assert 0.6 < report.micro_f1 <= 1 and 0.6 < report.macro_f1 <= 1 and report.log_loss > 0
    assert (report.fewest, report.most, report.texts, report.classes) == (14, 16, 30, 2)
    assert f"several labels a text: micro F1 {report.micro_f1:.3f}" in str(report)


def test_tuples_sets_and_repeated_labels_are_lists(encoder, pairs, fitted):
    kinds = [tuple, set, frozenset, lambda row: row * 2]
    labels = [kinds[i % 4](row) for i, row in enumerate(pairs[1])]
    again = TextClassifier(encoder, steps=0, device="cpu").fit(pairs[0], labels)
    assert (again.predict_proba(pairs[0]) == fitted.predict_proba(pairs[0])).all()
    assert again.report_.data == fitted.report_.data


def test_a_saved_classifier_gives_the_same_lists(fitted, pairs, tmp_path):
    fitted.save(tmp_path / "saved")
    again = TextClassifier.load(tmp_path / "saved", device="cpu")
    assert again.predict(pairs[0]) == fitted.predict(pairs[0])
    assert (again.thresholds_ == fitted.thresholds_).all()
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "micro F1" in card and "none if there is" in card


def test_adaptation_is_judged_by_micro_f1_and_log_loss(encoder, pairs):
    classifier = TextClassifier(
        encoder, rule=AdamW(step_size=1e-2), steps=3, seconds=None, device="cpu"
    ).fit(*pairs)
    report = classifier.report_
    (kept,) = [e for e in report.tried if e.name == report.kept]
    first = report.tried[0]
    assert (kept.micro_f1, kept.log_loss) == (report.micro_f1, report.log_loss)
    assert kept.log_loss <= first.log_loss
    assert kept is first or not kept.name.endswith("adaptation") or kept.quality >= first.quality
    assert any(e.name.endswith("of adaptation") for e in report.tried)


def test_one_text_a_label_gives_thresholds_between_texts_with_and_without(encoder, texts):
    chosen = [text for text, _ in texts][:80:8]
    labels = [[f"label {i}"] for i in range(10)]
    classifier = TextClassifier(encoder, device="cpu").fit(chosen, labels)
    assert "none can be held out" in classifier.report_.reason
    assert classifier.report_.micro_f1 is None
    assert classifier.score(chosen, labels) > 0.9


# -- the objective


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_binary_cross_entropies_added_up_over_classes(seed):
    generator = np.random.default_rng(seed)
    logits, labels = 3 * generator.normal(size=(7, 4)), generator.integers(0, 2, size=(7, 4)) * 1.0
    wanted = [
        sum(log_loss([y], [[1 - p, p]], labels=[0, 1]) for y, p in zip(row, chances))
        for row, chances in zip(labels, SEVERAL.probabilities(logits))
    ]
    assert np.allclose(SEVERAL.losses(logits, labels), wanted)


def test_temperature_is_the_one_that_made_the_logits():
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(3000, 3))
    labels = (generator.uniform(size=logits.shape) < SEVERAL.probabilities(logits)) * 1.0
    assert SEVERAL.temperature(3 * logits, labels, np.ones(3000)) == pytest.approx(3, rel=0.1)


def test_each_class_is_a_logistic_regression_of_scikit_learn():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(30, 5))
    labels = np.stack([rows[:, 0] > 0, rows[:, 1] > 1, np.ones(30), np.zeros(30)], axis=1) * 1.0
    head = one_vs_rest_head(rows, labels, np.ones(30), 3.0)
    scale = np.sqrt(np.square(rows - rows.mean(axis=0)).sum(axis=1).mean())
    for number in (0, 1):
        model = LogisticRegression(C=3.0).fit((rows - rows.mean(axis=0)) / scale, labels[:, number])
        wanted = model.decision_function((rows - rows.mean(axis=0)) / scale)
        assert np.allclose(head.logits(rows)[:, number], wanted, atol=1e-2)
    assert np.allclose(head.logits(rows)[:, 2], np.log(30.5 / 0.5))  # that all texts have
    assert np.allclose(head.logits(rows)[:, 3], np.log(0.5 / 30.5))  # that none has


@given(
    labels=arrays(
        float,
        st.tuples(st.integers(2, 25), st.integers(1, 4)),
        elements=st.sampled_from([0.0, 1.0]),
    ),
    folds=st.integers(2, 5),
)
def test_folds_hold_out_every_text_once_but_the_only_one_of_a_class(labels, folds):
    made = iterative_folds(labels, folds, seed=0)
    alone = (labels[:, labels.sum(axis=0) == 1] > 0).any(axis=1)
    held = sorted(int(i) for _, part in made for i in part)
    assert held in ([], np.flatnonzero(~alone).tolist())
    assert len(made) <= folds
    for known, part in made:
        assert not set(known) & set(part) and len(known) + len(part) == len(labels)


def test_folds_divide_every_class_evenly():
    generator = np.random.default_rng(0)
    labels = (generator.uniform(size=(60, 5)) < [0.5, 0.3, 0.2, 0.15, 0.1]) * 1.0
    for _, part in iterative_folds(labels, 5, seed=0):
        assert (np.abs(labels[part].sum(axis=0) - labels.sum(axis=0) / 5) <= 2).all()
        assert abs(len(part) - 12) <= 3


def test_a_threshold_separates_what_can_be_separated():
    chances = np.array([[0.1, 0.7], [0.2, 0.75], [0.4, 0.8], [0.45, 0.9]] * 5)
    labels = np.array([[0, 0], [0, 0], [1, 1], [1, 1]] * 5) * 1.0
    thresholds = best_thresholds(chances, labels)
    assert ((chances >= thresholds) == labels).all()
    assert 0.2 < thresholds[0] < 0.4  # in the middle of what is equally good
    assert ((chances >= middle_thresholds(chances, labels)) == labels).all()


def test_a_rare_class_takes_its_threshold_from_all_classes():
    """One text says nothing of where its class's threshold should be."""
    generator = np.random.default_rng(0)
    labels = np.zeros((40, 3))
    labels[:20, 0], labels[10:30, 1], labels[5, 2] = 1, 1, 1
    chances = np.clip(np.where(labels > 0, 0.6, 0.3) + 0.05 * generator.normal(size=(40, 3)), 0, 1)
    chances[5, 2] = 0.02
    assert 0.3 < best_thresholds(chances, labels)[2] < 0.6


def test_f1_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    answers, labels = generator.integers(0, 2, size=(2, 30, 4))
    micro, macro = micro_macro_f1(answers, labels)
    assert micro == pytest.approx(f1_score(labels, answers, average="micro"))
    assert macro == pytest.approx(f1_score(labels, answers, average="macro"))
    assert micro_macro_f1(np.zeros((2, 2)), np.zeros((2, 2))) == (0, 0)


def test_figures_of_a_known_case(fitted, pairs):
    chances, labels = np.array([[0.9, 0.4], [0.2, 0.6]]), np.array([[1.0, 1.0], [0.0, 1.0]])
    figures = Figures.of_several(chances, labels, np.array([0.5, 0.5]))
    assert figures.accuracy == 0.5 and figures.micro_f1 == pytest.approx(2 * 2 / 5)
    assert figures.log_loss == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.6]).sum() / 2)
    assert "on 2 texts: all labels right 0.500" in str(figures)
    with pytest.warns(UserWarning, match="30 of the 30 texts to judge by stand among those that"):
        found = fitted.evaluate(*pairs)
    assert found.accuracy == fitted.score(*pairs) and found.micro_f1 > 0.8


# -- bad input


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["a"], "a"], "label 1 is 'a', and others are lists; .* put it in .brackets."),
        ([["a"], [1]], r"label 1 is \[1\]; lists of labels must hold strings: convert them"),
        ([["a"]], "2 texts and 1 lists of labels; give each text one list"),
        ([["a"], ["a"]], r"all 2 texts have the labels \['a'\]; a classifier needs texts of other"),
        ([[], []], r"all 2 texts have the labels \[\]; .* or of none: add some"),
        (np.array([[0, 1], [1, 0]]), "an array; where a text has several labels, give it a list"),
    ],
)
def test_lists_that_can_not_be_used(labels, message, encoder):
    with pytest.raises(InputError, match=message):
        TextClassifier(encoder).fit(["a", "b"], labels)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"class_weight": "balanced"}, "class_weight is 'balanced', and texts have several labels"),
        ({"abstain": 0.1}, "abstain is 0.1, .*leave it at None: a text that no label is likely"),
        ({"abstain_below": 0.1}, "abstain_below is 0.1, and texts have several labels here"),
    ],
)
def test_settings_for_one_label_are_refused(setting, message, encoder, pairs):
    with pytest.raises(InputError, match=message):
        TextClassifier(encoder, **setting).fit(*pairs)


def test_labels_that_fit_has_not_seen(fitted):
    with pytest.raises(InputError, match="label 'sport' is none of the classifier's 2"):
        fitted.evaluate(["a"], [["food", "sport"]])


# -- files


@pytest.mark.parametrize("name", ["f.csv", "f.jsonl"])
def test_a_file_with_several_labels(name, tmp_path):
    path = tmp_path / name
    rows = [("a  b", "x; y"), ("c", ""), ("d", "y"), ("A b", "z;x")]
    if name == "f.csv":
        path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    else:
        lists = [(text, [part for part in label.split(";") if part]) for text, label in rows]
        path.write_text("".join(json.dumps({"text": t, "label": row}) + "\n" for t, row in lists))
    found = read_several(path, ";")
    assert found.texts == ["a b", "c", "d"]  # the last repeats the first, whose labels grow
    assert found.labels == [["x", "y", "z"], [], ["y"]]
    assert str(found) == "3 texts, 3 labels, 1.33 labels a text, 1 duplicate dropped"


@pytest.mark.parametrize(
    ("content", "separator", "message"),
    [
        ('{"text": "a", "label": ["x", 1]}', ";", "line 1: column 'label' is a list of more than"),
        ('{"text": "a", "label": "x"}', " ", "--label-separator is ' '; it must be a visible"),
        ('{"text": "a", "labels": "x"}', ";", "no column 'label', the columns are text, labels"),
        ("", ";", "no rows, needs at least one"),
    ],
)
def test_files_that_can_not_be_read(content, separator, message, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_several(path, separator)

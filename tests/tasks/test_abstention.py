"""Texts that belong to no label: a floor of the largest logit, learned from texts held out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnopt import TextClassifier
from rnnopt.errors import InputError
from rnnopt.rules.classical import AdamW
from rnnopt.tasks.text.estimator.answers import Decision, floor_of
from rnnopt.tasks.text.estimator.evidence import Judged


@pytest.fixture(scope="module")
def known(texts):
    """Texts of three classes, their labels, and texts of the other seven."""
    inside = [pair for pair in texts if pair[1] in ("food", "music", "work")]
    outside = [text for text, label in texts if label not in ("food", "music", "work")]
    return [text for text, _ in inside], [label for _, label in inside], outside


@pytest.fixture(scope="module")
def fitted(encoder, known):
    return TextClassifier(encoder, steps=0, abstain=0.1, device="cpu").fit(known[0], known[1])


def test_a_text_whose_largest_logit_is_below_the_floor_has_no_answer(fitted, known):
    floor = fitted.report_.floor
    for texts in (known[0], known[2]):
        answers, logits = fitted.predict(texts), fitted.logits(texts)
        low = logits.max(axis=1) < floor
        assert [answer is None for answer in answers] == low.tolist()
        assert (answers[~low] == fitted.classes_[logits[~low].argmax(axis=1)]).all()


def test_texts_of_other_classes_are_answered_less_often(fitted, known):
    inside, outside = (
        np.mean([answer is not None for answer in fitted.predict(texts)])
        for texts in (known[0], known[2])
    )
    assert inside > 0.9 and outside < inside - 0.1


def test_at_most_the_share_of_the_texts_held_out_has_no_answer(fitted, known):
    report = fitted.report_
    assert report.answered == 1 - int(0.1 * len(known[0])) / len(known[0])
    assert report.answered_accuracy >= report.accuracy - 0.1
    assert f"no answer where the largest logit is below {report.floor:.2f}" in str(report)


@given(share=st.floats(0, 0.999), rows=st.lists(st.floats(-9, 9), min_size=1, max_size=40))
def test_the_floor_leaves_out_no_more_than_the_share(share, rows):
    logits = np.stack([np.array(rows), np.full(len(rows), -10.0)], axis=1)
    judged = Judged.of("", logits, np.zeros(len(rows), int), np.ones(len(rows)))
    floor = floor_of(judged, share)
    assert (judged.logits.max(axis=1) < floor).mean() <= share


def test_a_floor_and_a_probability_both_bound():
    logits = np.array([[2.0, 1.9], [2.0, 0.0], [1.0, -1.0]])
    classes = np.array(["a", "b"])
    assert Decision(classes).answers(logits).tolist() == ["a", "a", "a"]
    assert Decision(classes, floor=1.5).answers(logits).tolist() == ["a", "a", None]
    assert Decision(classes).answers(logits, 0.8).tolist() == [None, "a", "a"]
    assert Decision(classes, floor=1.5).answers(logits, 0.8).tolist() == [None, "a", None]


@pytest.mark.filterwarnings("ignore:.* stand among those that it was fitted on")
def test_it_is_saved_and_judged(fitted, known, tmp_path):
    fitted.save(tmp_path / "saved")
    again = TextClassifier.load(tmp_path / "saved", device="cpu")
    assert again.predict(known[2]).tolist() == fitted.predict(known[2]).tolist()
    assert "gets no answer" in (tmp_path / "saved" / "README.md").read_text()
    figures = again.evaluate(known[0], known[1])
    answers = again.predict(known[0])
    given = np.array([answer is not None for answer in answers])
    assert figures.answered == given.mean()
    assert figures.answered_accuracy == (answers[given] == np.array(known[1])[given]).mean()
    assert "of them answered, and" in str(figures)
    plain = TextClassifier.load(tmp_path / "saved", device="cpu").set_params(abstain_below=0.0)
    assert plain.evaluate(known[0], known[1]).answered == figures.answered


def test_an_adapted_classifier_has_the_floor_of_its_own_logits(encoder, known):
    rule = AdamW(step_size=1e-2)
    classifier = TextClassifier(
        encoder, rule=rule, steps=3, seconds=None, abstain=0.2, device="cpu"
    ).fit(known[0][::3], known[1][::3])
    assert classifier.report_.answered == 1 - int(0.2 * 24) / 24


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_can_not_be_used(share, encoder, known):
    with pytest.raises(InputError, match=r"abstain is .*at least 0 and below 1, and 0.05 is usual"):
        TextClassifier(encoder, abstain=share).fit(known[0], known[1])


def test_one_text_a_label_has_nothing_to_choose_by(encoder):
    with pytest.raises(InputError, match=r"abstain is 0.1, and every label has one text.*give"):
        TextClassifier(encoder, abstain=0.1).fit(["a", "b"], ["x", "y"])

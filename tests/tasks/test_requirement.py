"""Requirements: what is read is what was meant, and what can't be meant is refused."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rnnopt import InputError
from rnnopt.tasks.requirement import DIGITS, Condition, Requirement

METRICS = ("accuracy", "precision", "recall", "f1", "loss")
HORIZON = 10
OPERATORS = {
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
}


@st.composite
def conditions(draw):
    metric = draw(st.sampled_from(METRICS))
    operator = draw(st.sampled_from(list(OPERATORS)))
    threshold = draw(st.floats(0, 1 if metric != "loss" else 1e6))
    assume((operator, threshold) != ("<", 0) and (operator, threshold, metric) != (">", 1, metric))
    return Condition(metric, draw(st.none() | st.integers(1, HORIZON)), operator, threshold)


requirements = st.lists(conditions(), min_size=1, max_size=4).map(lambda c: Requirement(tuple(c)))
columns = st.lists(st.none() | st.floats(0, 1) | st.just(0.85), min_size=HORIZON, max_size=HORIZON)
figures = st.fixed_dictionaries({metric: columns for metric in METRICS})


def parse(text, metrics=METRICS, horizon=HORIZON):
    return Requirement.parse(text, metrics, horizon)


@given(requirement=requirements)
def test_what_is_written_is_read_again(requirement):
    assert parse(str(requirement)) == requirement


@given(
    requirement=requirements,
    space=st.sampled_from(["", " ", "  \t"]),
    joint=st.sampled_from([",", " and ", " AND ", " , "]),
)
def test_white_space_case_and_the_joint_mean_nothing(requirement, space, joint):
    parts = [
        space.join(["", c.name.upper().replace("@", f"{space}@{space}"), c.operator])
        + space + repr(c.threshold) + space
        for c in requirement.conditions
    ]  # fmt: skip
    assert parse(joint.join(parts)) == requirement


@given(requirement=requirements, figures=figures)
def test_it_is_met_if_every_comparison_holds_to_the_digits_written(requirement, figures):
    def holds(condition):
        value = figures[condition.metric][(condition.budget or HORIZON) - 1]
        if value is None:
            return False
        return OPERATORS[condition.operator](round(value, DIGITS), condition.threshold)

    expected = all(map(holds, requirement.conditions))
    assert requirement.met(figures) == expected
    assert requirement.words(figures).endswith(": met" if expected else ": not met")


@given(requirement=requirements, figures=figures)
def test_the_rank_of_what_is_met_is_the_highest(requirement, figures):
    met, margin = requirement.rank(figures)
    assert (met == len(requirement.conditions)) == requirement.met(figures)
    assert (margin >= 0) >= requirement.conditions[0].met(figures)


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_figure_that_is_not_finite_meets_nothing(value, operator):
    condition = Condition("loss", None, operator, 1.0)
    assert not condition.met({"loss": [value]})
    assert condition.margin({"loss": [value]}) == -math.inf


def test_a_mean_that_floats_leave_just_below_the_mark_meets_it():
    mean = sum([0.1] * 10) / 10  # a tenth, less 1e-17
    assert mean < 0.1
    assert parse("accuracy>=0.1").met({"accuracy": [mean]})


def test_without_a_budget_the_last_figure_counts():
    requirement = parse("accuracy>=0.5")
    assert requirement.met({"accuracy": [0.1, 0.6]})
    assert not requirement.met({"accuracy": [0.6, 0.1]})
    assert parse("accuracy@1>=0.5").met({"accuracy": [0.6, 0.1]})


def test_the_decision_says_figure_and_mark():
    words = parse("accuracy@2>=0.85 and loss<1").words({"accuracy": [0, 0.8125], "loss": [2, None]})
    assert words == ("accuracy@2 0.8125 (needs >= 0.85); loss not finite (needs < 1): not met")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "can't read ''"),
        ("accuracy", "can't read 'accuracy'"),
        ("accuracy=0.9", "can't read 'accuracy=0.9'; write METRIC"),
        ("accuracy==0.9", "one of >=, >, <=, <"),
        ("accuracy>=", "can't read 'accuracy>='"),
        ("accuracy>=high", "can't read 'accuracy>=high'"),
        ("accuracy>=nan", "can't read 'accuracy>=nan'"),
        ("0.9<=accuracy", "can't read '0.9<=accuracy'"),
        ("accuracy>=0.9 and", "can't read ''"),
        ("accuracy>=0.9 or loss<1", "can't read 'accuracy>=0.9 or loss<1'"),
        ("accuracy@>=0.9", "can't read 'accuracy@>=0.9'"),
        ("accuracy@1.5>=0.9", "can't read 'accuracy@1.5>=0.9'"),
        ("speed>=1", "no metric 'speed'; choose from accuracy, precision, recall, f1, loss"),
        ("accuracy@0>=0.9", r"budget @0 must lie between 1 and 10, the steps of adaptation"),
        ("accuracy@-3>=0.9", r"budget @-3 must lie between 1 and 10"),
        ("accuracy@11>=0.9", r"budget @11 must lie between 1 and 10"),
        ("accuracy>=90", "accuracy is compared with 90, which must lie between 0 and 1"),
        ("loss<-1", "loss is compared with -1, which must be finite and at least 0"),
        ("loss<inf", "loss is compared with inf"),
        ("accuracy>1", "is never > 1; use >= or another number"),
        ("loss<0", "is never < 0; use <= or another number"),
    ],
)
def test_what_can_not_be_meant_is_refused_with_value_constraint_and_example(text, message):
    with pytest.raises(InputError) as refusal:
        parse(text)
    assert f"requirement {text!r}: " in str(refusal.value)
    assert message in str(refusal.value)
    assert "such as 'accuracy@5>=0.85 and loss<1'" in str(refusal.value)


def test_budgets_are_refused_where_there_are_none():
    with pytest.raises(InputError, match="budget @5: this command checks the newest step only"):
        parse("accuracy@5>=0.9", horizon=None)


@given(budget=st.integers(-20, 40))
def test_budgets_lie_within_the_horizon(budget):
    text = f"accuracy@{budget}>=0.5"
    if 1 <= budget <= HORIZON:
        assert parse(text).conditions[0].budget == budget
    else:
        with pytest.raises(InputError, match=f"budget @{budget} must lie between 1 and 10"):
            parse(text)


@pytest.mark.parametrize("horizon", [None, 1, 4, 5, 50])
def test_the_example_of_a_refusal_is_no_mistake_itself(horizon):
    with pytest.raises(InputError) as refusal:
        parse("nonsense", horizon=horizon)
    parse(str(refusal.value).split("such as ")[1].strip("'"), horizon=horizon)


@given(text=st.text(max_size=30))
def test_any_other_text_is_refused_or_read_never_worse(text):
    try:
        requirement = parse(text)
    except InputError as refusal:
        assert repr(text) in str(refusal)
    else:
        assert parse(str(requirement)) == requirement

"""Whose classes tune and whose judge: the options of a comparison that say it."""

import pytest

from rnnopt import InputError
from rnnopt.cli.compare import comparison_data, comparison_sampler
from rnnopt.cli.settings.commands import Compare
from rnnopt.data.splits import read_splits

NOUNS = ("rain", "song", "bank", "soup", "train", "alarm", "pill", "goal")


def write(folder, **parts):
    """Files of texts, 6 for each label."""
    folder.mkdir()
    for part, labels in parts.items():
        rows = [f"{folder.name} {label} says {noun},{label}" for label in labels for noun in NOUNS]
        (folder / f"{part}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def small(tmp_path):
    """Too few classes to divide."""
    return write(tmp_path / "small", all=["a", "b", "c"])


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "whole", train=["p", "q"], val=["r", "s"], test=["t", "u", "v"])


def options(data, **more):
    given = {"ways": 2, "shots": 2, "queries": 2, **more}
    return Compare(data=[data], encoder="encoder", json="result.json", **given)


def labels(corpus):
    return set(corpus.labels)


def test_by_default_validation_tunes_and_test_judges(whole):
    assert comparison_data(options(whole)) == read_splits([whole])


def test_all_classes_judge_where_other_data_tune(small, whole):
    splits = comparison_data(options(small, report_on="all", tuning_data=[whole]))
    assert (labels(splits.validation), labels(splits.test)) == ({"r", "s"}, {"a", "b", "c"})
    splits = comparison_data(options(whole, report_on="all", tuning_data=["stdlib"]))
    assert labels(splits.test) == set("pqrstuv")


def test_validation_classes_judge_where_other_data_tune(whole):
    splits = comparison_data(options(whole, report_on="val", tuning_data=["stdlib"]))
    assert labels(splits.test) == {"r", "s"}
    assert set(splits.validation.domains) == {"stdlib"}


@pytest.mark.parametrize("report_on", ["val", "all"])
def test_no_class_may_tune_and_judge(report_on, whole):
    with pytest.raises(InputError, match=f"--report-on {report_on}: .* with --tuning-data"):
        comparison_data(options(whole, report_on=report_on))
    with pytest.raises(InputError, match="--tuning-data and --data have classes in common"):
        comparison_data(options(whole, report_on=report_on, tuning_data=[whole]))


def test_fewer_ways_takes_as_many_as_there_are(whole):
    splits = comparison_data(options(whole))
    wide = options(whole, ways=3, fewer_ways=True)
    assert comparison_sampler(wide, splits.test).ways == (3,)
    assert comparison_sampler(wide, splits.validation).ways == (2,)
    narrow = options(whole, ways=2, fewer_ways=True)
    assert comparison_sampler(narrow, splits.test).ways == (2,)
    with pytest.raises(InputError, match="lower --ways"):
        comparison_sampler(options(whole, ways=3), splits.validation)
    # a class counts if it has the texts
    with pytest.raises(InputError, match="lower --ways, --shots or --queries"):
        comparison_sampler(options(whole, fewer_ways=True, shots=9), splits.test)

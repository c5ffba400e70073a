"""Sources: their weights decide how often they are drawn, and what they hold is told."""

import string
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnopt import InputError
from rnnopt.data.sources import describe, overlap_lines, parse_sources, weigh
from rnnopt.data.splits import read_splits
from rnnopt.evaluation.report.tables import sources_table
from rnnopt.tasks.episodes import EpisodeSampler

names = st.text(string.ascii_letters + "/._-", min_size=1, max_size=10).filter(
    lambda name: not name.endswith("/")
)


def write(path, classes, texts=6, words="text"):
    """A CSV file of so many classes with so many texts, and the first text once more."""
    rows = [
        (f"{words} {i} of {c}", f"{path.stem}{c}") for c in range(classes) for i in range(texts)
    ]
    rows.append(rows[0])
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return str(path)


@given(
    sources=st.dictionaries(
        names, st.none() | st.floats(0, exclude_min=True, allow_infinity=False), min_size=1
    )
)
def test_a_weight_is_what_stands_behind_the_last_equals_sign(sources):
    data = [name if weight is None else f"{name}={weight!r}" for name, weight in sources.items()]
    paths, weights = parse_sources(data)
    assert paths == list(sources)
    assert weights == {name: weight for name, weight in sources.items() if weight is not None}


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan", "", "much"])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(InputError, match="must be a positive, finite number, as in a/b=2"):
        parse_sources([f"a/b={weight}"])


def test_what_exists_under_its_whole_name_is_a_path(tmp_path):
    (tmp_path / "run=3").mkdir()
    path = str(tmp_path / "run=3")
    assert parse_sources([path, f"{path}=2", f"{path}/x.csv"]) == (
        [path, path, f"{path}/x.csv"],
        {path: 2.0},
    )


def test_sources_are_drawn_in_proportion_to_their_weights_however_many_domains_they_have(tmp_path):
    one, many = tmp_path / "one.csv", tmp_path / "many.csv"
    for path, domains in ((one, ["one"]), (many, "xyz")):
        rows = [(d, c, i) for d in domains for c in range(6) for i in range(2)]
        path.write_text(
            "text,label,domain\n" + "".join(f"{i} of {c} in {d},{d}{c},{d}\n" for d, c, i in rows)
        )
    splits = read_splits([one, many], domain_column="domain")
    weights = weigh(splits, {str(one): 3.0})
    assert sum(weights[d] for d in "xyz") == pytest.approx(1.0)  # one that has no weight counts 1
    assert weights["one"] == 3.0
    own = {name: weight for name, weight in weights.items() if name in splits.train.domains}
    sampler = EpisodeSampler(splits.train, ways=2, shots=1, queries=1, seed=0, domain_weights=own)
    drawn = Counter(sampler.sample(i).classes[0][0] for i in range(400))
    assert 270 < drawn["one"] < 330  # 300 expected, 9 deviation


def test_without_weights_all_domains_are_alike(tmp_path):
    assert weigh(read_splits([write(tmp_path / "a.csv", 6)]), {}) == {}


def test_a_path_may_be_spelled_in_two_ways(tmp_path):
    splits = read_splits([write(tmp_path / "a.csv", 6)])
    assert weigh(splits, {f"{tmp_path}/./a.csv": 4.0}) == {"a": 4.0}


def test_the_description_counts_classes_texts_and_duplicates_by_source(tmp_path):
    paths = [write(tmp_path / "a.csv", 10), write(tmp_path / "b.csv", 6, texts=9, words="word")]
    splits = read_splits(paths)
    told = describe(replace(splits, weights=weigh(splits, {paths[0]: 2.0})))
    a, b = told["sources"]
    assert (a["source"], a["domains"], a["weight"], a["duplicates"]) == (paths[0], ["a"], 2.0, 1)
    assert a["classes"] == {"train": 6, "validation": 2, "test": 2}
    assert a["texts"] == {"train": 36, "validation": 12, "test": 12}
    assert sum(b["texts"].values()) == 54
    assert told["overlaps"] == told["unsafe"] == []
    lines = sources_table(told).splitlines()
    assert len(lines) == 4
    assert "6 / 2 / 2" in lines[2] and "36 / 12 / 12" in lines[2]
    assert overlap_lines(told) == []


def test_what_two_sources_have_in_common_is_told(tmp_path):
    paths = [write(tmp_path / "a.csv", 10), write(tmp_path / "b.csv", 6)]
    told = describe(read_splits(paths, allow_overlap=True))
    (overlap,) = told["overlaps"]
    assert overlap["between"] == paths
    assert (overlap["classes"], overlap["texts"]) == (6, 36)
    assert overlap["examples"][0] == "a/a0 = b/b0"
    first, *cautions = overlap_lines(told)
    assert first.endswith("(a/a0 = b/b0, a/a1 = b/b1, a/a2 = b/b2), texts 36")
    # the classes of the two are dealt out differently
    assert cautions[0].startswith("CAUTION: train and validation overlap: classes")

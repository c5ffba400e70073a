"""What an episode is, and what a corpus must have for episodes to be drawn from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnopt.data.corpus import Corpus, text_key
from rnnopt.errors import InputError
from rnnopt.tasks.episodes import Episode, EpisodeSampler


def make(counts: dict[tuple[str, str], int]) -> Corpus:
    """A corpus with so many distinct texts per class."""
    rows = [
        (f"{domain} {label} {i}", label, domain)
        for (domain, label), count in counts.items()
        for i in range(count)
    ]
    texts, labels, domains = zip(*rows)
    return Corpus(texts, labels, domains)


CORPUS = make({(domain, label): 9 for domain in "xyz" for label in "abcdef"})


def sampler(corpus: Corpus = CORPUS, **options: Any) -> EpisodeSampler:
    return EpisodeSampler(corpus, **{"ways": 3, "shots": 2, "queries": 4, "seed": 0, **options})


def error(corpus: Corpus = CORPUS, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        sampler(corpus, **options)
    return str(caught.value)


def contents(episode: Episode) -> tuple[object, ...]:
    arrays = (episode.support, episode.support_labels, episode.query, episode.query_labels)
    return (*(array.tolist() for array in arrays), episode.classes)


episodes = st.builds(
    lambda ways, shots, queries, seed, index: (
        sampler(ways=ways, shots=shots, queries=queries, seed=seed).sample(index),
        (ways, shots, queries),
    ),
    st.integers(2, 6),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
)


# --- one episode ---------------------------------------------------------------------------------


@given(episodes)
def test_each_class_has_its_shots_and_its_queries(drawn: tuple[Episode, tuple[int, ...]]) -> None:
    episode, (ways, shots, queries) = drawn
    assert Counter(episode.support_labels.tolist()) == dict.fromkeys(range(ways), shots)
    assert Counter(episode.query_labels.tolist()) == dict.fromkeys(range(ways), queries)


@given(episodes)
def test_labels_stand_for_the_classes_of_the_texts(
    drawn: tuple[Episode, tuple[int, ...]],
) -> None:
    episode, _ = drawn
    for indices, labels in (
        (episode.support, episode.support_labels),
        (episode.query, episode.query_labels),
    ):
        for index, label in zip(indices, labels):
            assert episode.classes[label] == (CORPUS.domains[index], CORPUS.labels[index])


@given(episodes)
def test_no_text_is_drawn_twice(drawn: tuple[Episode, tuple[int, ...]]) -> None:
    episode, _ = drawn
    both = [*episode.support.tolist(), *episode.query.tolist()]
    assert len(set(both)) == len(both)


@given(episodes)
def test_an_episode_is_of_one_domain(drawn: tuple[Episode, tuple[int, ...]]) -> None:
    episode, (ways, _, _) = drawn
    assert len({domain for domain, _ in episode.classes}) == 1
    assert len(set(episode.classes)) == ways


@given(st.lists(st.sampled_from(["t", "T ", " t", "u", "U", "v  w", "V w", "x"]), min_size=8))
def test_support_and_query_share_no_text_even_where_a_corpus_repeats_itself(
    texts: list[str],
) -> None:
    labels = tuple("ab"[i % 2] for i in range(len(texts)))
    corpus = Corpus((*texts, "1", "2", "3", "4"), (*labels, *"aabb"), ("d",) * (len(texts) + 4))
    for index in range(5):
        episode = sampler(corpus, ways=2, shots=1, queries=1).sample(index)
        support = {text_key(corpus.texts[i]) for i in episode.support}
        assert support.isdisjoint(text_key(corpus.texts[i]) for i in episode.query)


def test_indices_and_labels_are_int64() -> None:
    episode = sampler().sample(0)
    arrays = (episode.support, episode.support_labels, episode.query, episode.query_labels)
    assert {array.dtype for array in arrays} == {np.dtype(np.int64)}


def test_labels_come_in_random_order_within_support_and_query() -> None:
    drawn = [sampler().sample(index) for index in range(20)]
    assert len({tuple(episode.support_labels.tolist()) for episode in drawn}) > 10
    assert len({tuple(episode.query_labels.tolist()) for episode in drawn}) > 10


def test_which_class_a_label_stands_for_is_random() -> None:
    corpus = make({("d", "a"): 9, ("d", "b"): 9})
    drawn = [sampler(corpus, ways=2).sample(index).classes for index in range(200)]
    assert 70 < drawn.count((("d", "a"), ("d", "b"))) < 130


# --- the same again ------------------------------------------------------------------------------


def test_an_episode_depends_on_seed_and_index_alone() -> None:
    one, two = sampler(ways=[2, 3], shots=[1, 2]), sampler(ways=[2, 3], shots=[1, 2])
    forward = [contents(one.sample(index)) for index in range(10)]
    backward = [contents(two.sample(index)) for index in reversed(range(10))]
    assert forward == backward[::-1]


def test_seeds_and_indices_give_different_episodes() -> None:
    drawn = [str(contents(sampler(seed=s).sample(i))) for s in range(5) for i in range(5)]
    assert len(set(drawn)) == 25


def test_a_negative_index_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^index=-1: must be a whole number, at least 0$"):
        sampler().sample(-1)


# --- which domain, how many ways and shots -------------------------------------------------------


def test_ways_and_shots_are_drawn_uniformly_from_what_is_given() -> None:
    mixed = sampler(ways=[2, 5], shots=[1, 4])
    drawn: Counter[tuple[int, int]] = Counter()
    for index in range(400):
        episode = mixed.sample(index)
        drawn[len(episode.classes), len(episode.support) // len(episode.classes)] += 1
    assert set(drawn) == {(2, 1), (2, 4), (5, 1), (5, 4)}
    assert all(70 < count < 130 for count in drawn.values())


def domains_drawn(drawing: EpisodeSampler, episodes: int = 400) -> Counter[str]:
    return Counter(drawing.sample(index).classes[0][0] for index in range(episodes))


def test_domains_are_drawn_alike_by_default() -> None:
    assert all(100 < count < 167 for count in domains_drawn(sampler()).values())


def test_domains_are_drawn_by_weight_and_count_1_where_not_named() -> None:
    drawn = domains_drawn(sampler(domain_weights={"x": 6.0, "y": 1}))
    assert 270 < drawn["x"] < 330
    assert 30 < drawn["y"] < 70
    assert 30 < drawn["z"] < 70


def test_huge_weights_are_proportions_like_any_other() -> None:
    drawn = domains_drawn(sampler(domain_weights=dict.fromkeys("xyz", 1e308)))
    assert all(100 < count < 167 for count in drawn.values())


def test_a_domain_is_left_out_only_where_it_is_too_small() -> None:
    corpus = make({**{("big", c): 9 for c in "abcde"}, **{("small", c): 9 for c in "ab"}})
    drawing = sampler(corpus, ways=[2, 5])
    drawn = {(len(e.classes), e.classes[0][0]) for e in map(drawing.sample, range(60))}
    assert drawn == {(2, "big"), (2, "small"), (5, "big")}


def test_classes_with_too_few_texts_are_never_drawn() -> None:
    corpus = make({("d", "a"): 6, ("d", "b"): 5, ("d", "c"): 6})
    drawing = sampler(corpus, ways=2)
    assert drawing.eligible_classes(2) == {"d": [("d", "a"), ("d", "c")]}
    assert {key for i in range(20) for key in drawing.sample(i).classes} == {("d", "a"), ("d", "c")}


def test_repeated_texts_do_not_make_a_class_eligible() -> None:
    corpus = Corpus(("t", "T", "u", "v", "w"), tuple("aaabb"), ("d",) * 5)
    assert sampler(corpus, ways=2, shots=1, queries=1).eligible_classes(2) == {"d": []}


def test_the_same_labels_in_many_domains_are_told_apart() -> None:
    corpus = make({(domain, label): 9 for domain in "wxyz" for label in ("bad", "good")})
    assert set(domains_drawn(sampler(corpus, ways=2), 60)) == set("wxyz")


# --- what can't be drawn -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "ways=1: must be a whole number, at least 2"),
        ({"ways": [3, 0]}, "ways=0: must be a whole number, at least 2"),
        ({"ways": []}, "ways is empty: give at least one number"),
        ({"ways": 2.5}, "ways=2.5: must be a whole number, at least 2"),
        ({"shots": 0}, "shots=0: must be a whole number, at least 1"),
        ({"queries": 0}, "queries=0: must be a whole number, at least 1"),
        ({"seed": -1}, "seed=-1: must be a whole number, at least 0"),
        (
            {"domain_weights": {"w": 1.0}},
            "domain_weights names 'w', which the corpus does not have; its domains are x, y, z",
        ),
        (
            {"domain_weights": {"x": 0.0}},
            "domain_weights['x']=0.0: must be positive and finite; to leave a domain out, leave it "
            "out of the corpus",
        ),
        (
            {"domain_weights": {"x": float("nan")}},
            "domain_weights['x']=nan: must be positive and finite; to leave a domain out, leave it "
            "out of the corpus",
        ),
        (
            {"ways": [2, 7]},
            "7-way episodes need a domain with 7 classes; x has 6, and no domain has more: lower "
            "--ways, or leave out the domain column; to compare on all classes of a file use "
            "--report-on all --tuning-data stdlib",
        ),
        (
            {"ways": [2, 3], "shots": [1, 6]},
            "2-way 6-shot with 4 queries needs 2 classes with 10 texts; x has 0: lower --ways, "
            "--shots or --queries",
        ),
    ],
)
def test_what_cannot_be_drawn_is_an_error(options: dict[str, Any], message: str) -> None:
    assert error(**options) == message


def test_the_domain_that_comes_closest_is_named() -> None:
    corpus = make({("x", "a"): 9, ("x", "b"): 4, ("y", "a"): 9, ("y", "b"): 9, ("y", "c"): 5})
    assert error(corpus) == (
        "3-way 2-shot with 4 queries needs 3 classes with 6 texts; y has 2: lower --ways, --shots "
        "or --queries"
    )


def test_a_single_domain_with_too_few_classes_has_no_domain_column_to_blame() -> None:
    assert error(make({("d", "a"): 9, ("d", "b"): 9})) == (
        "3-way episodes need a domain with 3 classes; d has 2, and no domain has more: lower "
        "--ways; to compare on all classes of a file use --report-on all --tuning-data stdlib"
    )


@pytest.mark.parametrize(("corpus", "count"), [(make({("d", "a"): 9}), 1), (Corpus((), (), ()), 0)])
def test_a_corpus_without_two_classes_is_an_error(corpus: Corpus, count: int) -> None:
    assert error(corpus) == (
        f"{count} classes in the corpus, a task needs at least 2: "
        "add labelled texts, or check the label column"
    )


def test_a_bound_on_the_support_leaves_each_number_of_ways_the_shots_that_fit() -> None:
    bounded = sampler(ways=(2, 5), shots=(1, 2, 5), most_support=10)
    drawn = Counter(
        (len(episode.classes), len(episode.support) // len(episode.classes))
        for episode in map(bounded.sample, range(300))
    )
    assert set(drawn) == {(2, 1), (2, 2), (2, 5), (5, 1), (5, 2)}
    assert min(drawn.values()) > 25  # 50 or 75 expected


def test_a_bound_that_changes_nothing_changes_no_episode() -> None:
    plain, bounded = sampler(shots=(1, 2)), sampler(shots=(1, 2), most_support=6)
    assert all(contents(plain.sample(i)) == contents(bounded.sample(i)) for i in range(20))


def test_a_bound_below_every_task_is_refused() -> None:
    message = error(ways=(2, 6), shots=(1, 2), most_support=5)
    assert message.startswith("most_support=5 (--most-support): 6-way 1-shot tasks need 6")

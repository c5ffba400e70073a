"""Recommendation: tables of ratings, ranking, and a run on made-up users."""

import gzip
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("pandas")

import field
import pandas as pd
import recommendation

import rnnopt

USERS, ITEMS = 50, 60


@pytest.fixture(scope="module")
def table():
    """Ratings by two tastes, 40 of each user."""
    drawn = np.random.default_rng(0)
    tastes, kinds = drawn.standard_normal((USERS, 2)), drawn.standard_normal((ITEMS, 2))
    rows = [
        (user, 7 * item, float(np.clip(np.round(3 + tastes[user] @ kinds[item]), 1, 5)))
        for user in range(USERS)
        for item in drawn.choice(ITEMS, 40, replace=False)
    ]
    return pd.DataFrame(rows, columns=["userId", "movieId", "rating"])


def test_a_table_is_read_from_csv_and_from_files_of_r(table, tmp_path):
    pyreadr = pytest.importorskip("pyreadr")
    table.to_csv(tmp_path / "ratings.csv", index=False)
    pyreadr.write_rdata(str(tmp_path / "movielens.rda"), table, df_name="movielens")
    pyreadr.write_rds(str(tmp_path / "table.rds"), table)
    content = (tmp_path / "table.rds").read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    objects = [zlib.compress(one) for one in (b"another object", content)]
    database = b"".join(len(one).to_bytes(4, "big") + one for one in objects)
    (tmp_path / "Rdata.rdb").write_bytes(database)
    for name in ("ratings.csv", "movielens.rda", "Rdata.rdb"):
        found = recommendation.read_ratings(tmp_path / name)
        assert np.array_equal(found.to_numpy(float), table.to_numpy(float)), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("movieId,rating\n1,3\n", "'userId' is missing; name it so in the first line"),
        ("userId,movieId,rating\n1,2,3\n,2,3\n", "row 2 has no userId.*remove the row"),
        ("userId,movieId,rating\n1,2,good\n", "row 1 has the rating 'good'.*finite number"),
        ("userId,movieId,rating\n1,2,3\n", "0 users have at least 30 ratings.*give more"),
    ],
)
def test_ratings_that_can_not_be_used_are_named(content, message, tmp_path):
    (tmp_path / "ratings.csv").write_text(content)
    with pytest.raises(rnnopt.InputError, match=message):
        recommendation.users_of(recommendation.read_ratings(tmp_path / "ratings.csv"), 0)


def test_a_file_that_is_not_there_or_holds_no_ratings_is_named(tmp_path):
    (tmp_path / "Rdata.rdb").write_bytes(b"\0\0\0\1" + zlib.compress(b"x"))
    for name in ("Rdata.rdb", "absent.csv"):
        with pytest.raises(rnnopt.InputError, match=f"{name}.*name a CSV file"):
            recommendation.read_ratings(tmp_path / name)


def test_ranking_is_1_for_the_right_order_and_rmse_that_of_the_numbers():
    rated = np.array([5.0, 1.0, 4.0, 2.0])
    best = recommendation.ranking(rated + 1, rated, 4.0)
    worst = recommendation.ranking(-rated, rated, 4.0)
    assert best == pytest.approx({"rmse": 1, "ndcg": 1, "auc": 1})
    assert worst["auc"] == 0 and worst["ndcg"] < 1


def test_factors_explain_ratings_better_than_item_means(table):
    (user, item), rating = table[["userId", "movieId"]].to_numpy().T, table["rating"].to_numpy()
    biases, vectors, mean_user = recommendation.factorise(
        user, item // 7, rating, ITEMS, 2, lambda: None, penalty=1.0
    )
    assert vectors.shape == (ITEMS, 2) and mean_user.shape == (2,)
    by_item = np.mean((rating - biases[item // 7]) ** 2)
    left = []
    for one in range(USERS):
        mine = user == one
        rows = np.column_stack([np.ones(mine.sum()), vectors[item[mine] // 7]])
        aim = rating[mine] - biases[item[mine] // 7]
        left.append(np.mean((aim - rows @ recommendation.ridge(rows, aim, 0.1)) ** 2))
    assert np.mean(left) < 0.5 * by_item


def test_no_user_is_in_two_parts(table):
    parts, items = recommendation.users_of(table, 0)
    assert len(items) == ITEMS and list(parts) == list(recommendation.SHARES)
    every = [tuple(rated.tolist()) for group in parts.values() for rated, _ in group]
    assert len(every) == len(set(every))


def test_a_run_writes_a_table_for_each_number_of_ratings(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recommendation, "SUPPORT", (5,))
    table.to_csv(tmp_path / "ratings.csv", index=False)
    options = field.Options(
        tmp_path / "ratings.csv", tmp_path, meta_steps=1, episodes=2, small=True,
        more={"factors": 2, "liked": 4.0},
    )  # fmt: skip
    recommendation.main(options)
    shown = capsys.readouterr().out
    for row in ("item mean", "ridge regression", "rmse after", "ndcg after", "auc after"):
        assert row in shown
    assert (tmp_path / "recommendation-5-ratings.json").exists()


def test_ridge_with_an_infinite_penalty_is_the_item_mean():
    net = recommendation.User(torch.eye(2), torch.tensor([3.0, 4.0]))
    both = torch.tensor([0, 1])
    task = recommendation.Rated((both, torch.tensor([5.0, 5.0])), (both, torch.tensor([3.0, 4.0])))
    found = recommendation.by_ridge(np.inf, rnnopt.Learner(net), task)
    assert found["rmse"] == 0 and found["loss"] == 0
    assert recommendation.by_ridge(0.1, rnnopt.Learner(net), task)["rmse"] > 0.5


def test_a_rating_without_a_user_ends_the_command_with_2(tmp_path, exit_code, capsys):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating\n,2,3\n")
    words = ("--data", tmp_path / "ratings.csv", "--output", tmp_path / "out")
    assert exit_code(recommendation, *words) == 2
    assert "row 1 has no userId" in capsys.readouterr().err

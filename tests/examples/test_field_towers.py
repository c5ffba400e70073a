"""Two towers: items by their texts, what a table must have, and a run on made-up users."""

import numpy as np
import pytest
import torch

pytest.importorskip("pandas")

import field
import pandas as pd
import recommendation
import towers

import rnnopt
from tests.encoders import tiny_bert

USERS, ITEMS = 50, 60
KINDS = ("Comedy", "Drama")


@pytest.fixture(scope="module")
def table():
    """Users who like comedies or dramas, 40 ratings each."""
    drawn = np.random.default_rng(0)
    tastes = drawn.standard_normal(USERS)
    rows = [
        (user, 7 * item, float(np.clip(np.round(3 + tastes[user] * (-1) ** item), 1, 5)),
         f"Film {item}", f"{KINDS[item % 2]}|War")
        for user in range(USERS)
        for item in drawn.choice(ITEMS, 40, replace=False)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=[*recommendation.COLUMNS, "title", "genres"])


def options(path, tmp_path, encoder, small=True):
    more = {"factors": 2, "liked": 4.0, "encoder": str(encoder)}
    return field.Options(path, tmp_path, meta_steps=1, episodes=2, small=small, more=more)


def test_towers_learn_from_texts_what_a_user_likes(table, tmp_path, monkeypatch):
    monkeypatch.setattr(towers, "STEPS", 300)
    users, items = recommendation.users_of(table, 0)
    texts = torch.randn(len(items), 3, generator=torch.Generator().manual_seed(0))
    texts[:, 0] = torch.tensor([(-1.0) ** (item // 7) for item in items])
    net = towers.make_model(texts, users["pretraining"], options("", tmp_path, "", small=False))
    assert net.vectors.shape == (ITEMS, 2) and net.vector.shape == (2,)
    errors = {0.3: [], np.inf: []}
    for rated, ratings in users["test"]:
        task = recommendation.Rated((rated[:20], ratings[:20]), (rated[20:], ratings[20:]))
        for penalty, found in errors.items():
            found.append(recommendation.by_ridge(penalty, rnnopt.Learner(net), task)["loss"])
    assert np.mean(errors[0.3]) < 0.5 * np.mean(errors[np.inf])


def test_items_are_read_by_title_and_genres(table, tmp_path, monkeypatch):
    monkeypatch.setattr(recommendation, "SUPPORT", (5,))
    seen = []
    encode = towers.encode
    monkeypatch.setattr(towers, "encode", lambda texts, name: seen.extend(texts) or
                        encode(texts, name))  # fmt: skip
    known = table.assign(title=table["title"].where(table["movieId"] != 7 * 5))
    known.to_csv(tmp_path / "ratings.csv", index=False)
    encoder = tiny_bert(tmp_path / "encoder")
    made = towers.make_field(options(tmp_path / "ratings.csv", tmp_path, encoder))
    assert len(seen) == ITEMS and "Film 3. Drama, War" in seen
    assert ". Drama, War" in seen  # an item without a title has its genres
    assert list(made.settings) == ["5-ratings"]
    task = made.task("test", 0, True)
    made.learner.begin(task, 0)
    assert {"loss", "rmse", "ndcg", "auc"} <= task.scores(made.learner.module).keys()
    for name, method in made.direct.items():
        assert method(made.learner, made.settings["5-ratings"]("test", 0, True))["rmse"] < 5, name


@pytest.mark.slow
def test_a_run_writes_a_table_for_each_number_of_ratings(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recommendation, "SUPPORT", (5,))
    table.to_csv(tmp_path / "ratings.csv", index=False)
    encoder = tiny_bert(tmp_path / "encoder")
    towers.main(options(tmp_path / "ratings.csv", tmp_path, encoder))
    shown = capsys.readouterr().out
    assert "A new user, by towers, 5-ratings" in shown and "rmse after" in shown
    assert (tmp_path / "towers-5-ratings.json").exists()


def test_ratings_without_titles_end_the_command_with_2(table, tmp_path, exit_code, capsys):
    table.drop(columns="title").to_csv(tmp_path / "ratings.csv", index=False)
    words = ("--data", tmp_path / "ratings.csv", "--output", tmp_path, "--encoder", tmp_path)
    assert exit_code(towers, *words) == 2
    assert "'title' is missing" in capsys.readouterr().err

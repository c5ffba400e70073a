"""What a new user will like, from 5, 10 or 20 ratings.

    python examples/fields/recommendation.py --data /usr/lib/R/site-library/dslabs/data/Rdata.rdb

Ratings are a CSV file with the columns userId, movieId and rating, or the table `movielens` of the
R package dslabs (Debian: `apt install r-cran-dslabs`), as its .rda file or its lazy-load database
.rdb. Users are divided into four groups: of one the model is pretrained, on one rules are
meta-trained, one is to choose learning rates and one for the report.

The model is a matrix factorisation, rating = mean + item bias + user bias + (user vector, M item
vector). Item biases and vectors are fixed once pretrained. A new user has a bias, a vector and a
matrix M of his own, which begin at 0, at the mean user and at the identity.
"""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import rnnopt

COLUMNS = ("userId", "movieId", "rating")


def read_ratings(path: Path) -> pd.DataFrame:
    """A table of ratings with the columns userId, movieId and rating."""
    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path)
        elif path.suffix == ".rdb":
            table = _from_lazy_load(path)
        else:
            import pyreadr

            table = pyreadr.read_r(str(path))["movielens"]
    except (OSError, KeyError, ValueError, zlib.error) as error:
        raise rnnopt.InputError(
            f"{path}: {error}; name a CSV file with the columns {', '.join(COLUMNS)}, or the .rda "
            "or .rdb file of the R package dslabs"
        ) from error
    return checked(path, table)


def _from_lazy_load(path: Path) -> pd.DataFrame:
    """The table with users and ratings of an R lazy-load database.

    Such a file is a row of objects, each 4 bytes of length and a zlib stream of R's serialisation,
    which a .rds file holds compressed by gzip.
    """
    import pyreadr

    rest = path.read_bytes()
    while rest:
        stream = zlib.decompressobj()
        object_, rest = stream.decompress(rest[4:]), stream.unused_data
        if all(name.encode() in object_ for name in COLUMNS):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "table.rds"
                file.write_bytes(gzip.compress(object_, 1))
                return pyreadr.read_r(str(file))[None]
    raise KeyError(f"there is no table with the columns {', '.join(COLUMNS)}")


def checked(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The columns that are used, if every row is a rating of an item by a user."""
    for column in COLUMNS:
        if column not in table:
            raise rnnopt.InputError(
                f"{path} has the columns {', '.join(map(str, table.columns))}: {column!r} is "
                "missing; name it so in the first line"
            )
        empty = table[column].isna()
        if empty.any():
            raise rnnopt.InputError(
                f"{path}: row {int(empty.argmax()) + 1} has no {column}: every rating needs a "
                "user, an item and a number; remove the row or complete it"
            )
    rating = pd.to_numeric(table["rating"], errors="coerce")
    if not np.isfinite(rating).all():
        row = int((~np.isfinite(rating)).argmax())
        raise rnnopt.InputError(
            f"{path}: row {row + 1} has the rating {table['rating'][row]!r}: it must be a finite "
            "number; correct or remove it"
        )
    return table.loc[:, list(COLUMNS)].assign(rating=rating.astype(float))


class User(nn.Module):
    """The ratings of one user, mean + item bias + user bias + (user vector, M item vector).

    Shapes: N items, D factors, B ratings.

    Args:
        vectors: of the items, (N, D).
        biases: of the items with the mean rating, (N,).
    """

    def __init__(self, vectors: Tensor, biases: Tensor) -> None:
        super().__init__()
        factors = vectors.shape[1]
        self.bias = nn.Parameter(torch.zeros(1))
        self.vector = nn.Parameter(torch.zeros(factors))
        self.mixing = nn.Parameter(torch.eye(factors))
        self.register_buffer("vectors", vectors)
        self.register_buffer("biases", biases)

    def forward(self, items: Tensor) -> Tensor:
        """Predicted ratings (B,) of items (B,)."""
        return self.biases[items] + self.bias + self.vectors[items] @ self.mixing.T @ self.vector


def factorise(
    users: np.ndarray,
    items: np.ndarray,
    ratings: np.ndarray,
    count: int,
    factors: int,
    penalty: float = 10.0,
    rounds: int = 10,
    tick: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Biases (N,), vectors (N, D) and the mean user vector (D,), by alternating least squares.

    Hu et al. 2008, section 4, with explicit ratings. Vectors are scaled so that those of users have
    a standard deviation of 1 in every factor.

    Args:
        users: of each rating, from 0.
        items: of each rating, from 0.
        ratings: the numbers.
        count: N, the number of items. One without a rating has the vector 0.
        factors: D.
        penalty: of the squared lengths, against the sum of squared errors.
        rounds: the number of times that both sides are solved for.
        tick: called after each round.
    """
    mean = ratings.mean()
    seen = np.bincount(items, minlength=count)
    biases = np.bincount(items, ratings - mean, count) / (seen + 5)
    left = ratings - mean - biases[items]
    vectors = 0.1 * np.random.default_rng(0).standard_normal((count, factors))
    people = np.zeros((users.max() + 1, 1 + factors))
    of_user = [np.flatnonzero(users == user) for user in range(len(people))]
    order = np.argsort(items, kind="stable")
    of_item = np.split(order, np.cumsum(seen)[:-1])
    for _ in range(rounds):
        for user, rows in enumerate(of_user):
            seen_by = np.column_stack([np.ones(len(rows)), vectors[items[rows]]])
            people[user] = ridge(seen_by, left[rows], penalty)
        for item, rows in enumerate(of_item):
            by = people[users[rows]]
            vectors[item] = ridge(by[:, 1:], left[rows] - by[:, 0], penalty)
        tick()
    scale = people[:, 1:].std(axis=0)
    return mean + biases, vectors * scale, people[:, 1:].mean(axis=0) / scale


def ridge(rows: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """The weights w that minimise ``|rows w - targets|^2 + penalty |w|^2``."""
    return np.linalg.solve(rows.T @ rows + penalty * np.eye(rows.shape[1]), rows.T @ targets)


def ranking(predicted: np.ndarray, rated: np.ndarray, liked: float) -> dict[str, float]:
    """RMSE, NDCG at 10, and AUC of liked against other items, of a user's further ratings.

    NDCG has the gain 2^rating - 1 (Burges et al. 2005). AUC is 0.5 if all or none are liked.
    """
    gain = 2**rated - 1
    best, found = (np.sort(gain)[::-1][:10], gain[np.argsort(-predicted, kind="stable")][:10])
    discount = 1 / np.log2(np.arange(len(best)) + 2)
    good = rated >= liked
    pairs = predicted[good][:, None] - predicted[~good][None]
    return {
        "rmse": float(np.sqrt(np.mean((predicted - rated) ** 2))),
        "ndcg": float(found @ discount / (best @ discount)),
        "auc": float(np.mean((pairs > 0) + 0.5 * (pairs == 0))) if pairs.size else 0.5,
    }


@dataclass
class Users:
    """The groups of users, and a task for each number."""

    of_group: dict[str, list[tuple[Tensor, Tensor]]]  # (items, ratings) of each user
    support: int
    liked: float = 4.0
    judged: int = 50

    def __call__(self, number: int) -> rnnopt.Task:
        """The user of this number: `support` ratings to adapt on, up to `judged` to judge by."""
        group = ("meta-training", "choosing", "report")[min(number // 1_000_000, 2)]
        users = self.of_group[group]
        items, ratings = users[number % len(users)]
        drawn = torch.Generator().manual_seed(number)
        order = torch.randperm(len(items), generator=drawn)[: self.support + self.judged]
        items, ratings = items[order], ratings[order]
        seen, asked = slice(self.support), slice(self.support, None)
        task = rnnopt.Task(
            lambda net, step: mse_loss(net(items[seen]), ratings[seen]),
            lambda net, step: mse_loss(net(items[asked]), ratings[asked]),
            lambda net: ranking(net(items[asked]).numpy(), ratings[asked].numpy(), self.liked),
        )
        task.ratings = items[seen], ratings[seen], items[asked], ratings[asked]
        return task

"""What a new user will like, from 5, 10 or 20 ratings.

    python examples/fields/recommendation.py --data Rdata.rdb --output out

Ratings are a CSV file with the columns userId, movieId and rating, or the table `movielens` of the
R package dslabs (Debian's r-cran-dslabs), as the .rda file of its sources or as the database
/usr/lib/R/site-library/dslabs/data/Rdata.rdb that it installs. Users are divided into four groups:
one pretrains the model, on one rules are meta-trained, one is to choose by, one for the report.

The model is a matrix factorisation, rating = mean + item bias + user bias + (user vector, M item
vector). Item biases and vectors are fixed once pretrained. A new user has a bias, a vector and a
matrix M of his own, which begin at 0, at the mean user and at the identity.
"""

from __future__ import annotations

import functools
import gzip
import random
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from field import Field, Options, at_default, command, kept, main_of
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import rnnopt
from rnnopt.cli.progress import progress_bar

COLUMNS = ("userId", "movieId", "rating")
SHARES = {"pretraining": 0.45, "train": 0.15, "validation": 0.1, "test": 0.3}  # of the users
SUPPORT = (5, 10, 20)  # ratings to adapt to
JUDGED, LEAST = 50, 30  # most ratings to be judged by; ratings of a user who takes part
ROUNDS = 10  # of alternating least squares
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)  # of ridge regression, chosen on validation users
MORE = {
    "factors": {"default": 8, "type": int, "help": "numbers an item is described by [8]"},
    "liked": {"default": 4.0, "type": float, "help": "rating from which an item is liked [4]"},
}
Ratings = tuple[Tensor, Tensor]  # items (B,), ratings (B,)
Users = dict[str, list[Ratings]]  # the ratings of each user, for each part


def read_ratings(path: Path, columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """A table of ratings with the columns userId, movieId and rating, or further ones.

    Raises:
        InputError: the file can't be read, a column is missing, or a row is not complete.
    """
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
            f"{path}: {error}; name a CSV file with the columns {', '.join(columns)}, or the .rda "
            "or .rdb file of the R package dslabs"
        ) from error
    return checked(path, table, columns)


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


def checked(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The columns that are used, if every row is a rating of an item by a user.

    Columns beside those of `COLUMNS` may have empty cells.
    """
    for column in columns:
        if column not in table:
            raise rnnopt.InputError(
                f"{path} has the columns {', '.join(map(str, table.columns))}: {column!r} is "
                "missing; name it so in the first line"
            )
        empty = table[column].isna()
        if column in COLUMNS and empty.any():
            raise rnnopt.InputError(
                f"{path}: row {int(empty.argmax()) + 1} has no {column}: every rating needs "
                f"{', '.join(COLUMNS)}; remove the row or complete it"
            )
    rating = pd.to_numeric(table["rating"], errors="coerce")
    if not np.isfinite(rating).all():
        row = int((~np.isfinite(rating)).argmax())
        raise rnnopt.InputError(
            f"{path}: row {row + 1} has the rating {table['rating'][row]!r}: it must be a finite "
            "number; correct or remove it"
        )
    return table.loc[:, list(columns)].assign(rating=rating.astype(float))


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
    tick: Callable[[], object],
    penalty: float = 10.0,
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
        tick: called after each round.
        penalty: of the squared lengths, against the sum of squared errors.
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
    for _ in range(ROUNDS):
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
    predicted = np.clip(np.nan_to_num(predicted), rated.min() - 10, rated.max() + 10)  # diverged
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


class Rated(rnnopt.Task):
    """Some ratings of a user to adapt to, and others to be judged by.

    Args:
        seen: items (B,) and ratings (B,) to adapt to.
        asked: items and ratings to be judged by.
        liked: the rating from which an item counts as liked.
        scored: whether the task reports more than its loss.
    """

    def __init__(
        self, seen: Ratings, asked: Ratings, liked: float = 4.0, scored: bool = True
    ) -> None:
        self.seen, self.asked, self.liked = seen, asked, liked
        super().__init__(
            lambda net, step: mse_loss(net(seen[0]), seen[1]),
            lambda net, step: mse_loss(net(asked[0]), asked[1]),
            (lambda net: self.judged(net(asked[0]))) if scored else None,
        )

    def judged(self, predicted: Tensor) -> dict[str, float]:
        """The figures of predicted ratings, see `ranking`."""
        return ranking(predicted.numpy(), self.asked[1].numpy(), self.liked)


def by_ridge(penalty: float, learner: rnnopt.Learner, task: Rated) -> dict[str, float]:
    """Ridge regression on the item vectors and a constant; an infinite penalty is the item mean."""
    net = learner.module
    (seen, seen_as), (asked, asked_as) = (
        (np.column_stack([np.ones(len(items)), net.vectors[items]]), rated - net.biases[items])
        for items, rated in (task.seen, task.asked)
    )
    found = torch.zeros(len(asked))
    if penalty < np.inf:
        weights = ridge(seen.astype(float), seen_as.numpy().astype(float), penalty)
        found = torch.from_numpy(asked @ weights).float()
    loss = float(mse_loss(found, asked_as))
    return task.judged(net.biases[task.asked[0]] + found) | {"loss": loss}


def users_of(table: pd.DataFrame, seed: int) -> tuple[Users, list[int]]:
    """The ratings of the users of each part, and the movieId of each of their numbers of items.

    Raises:
        InputError: too few users have rated enough.
    """
    items = {item: number for number, item in enumerate(table["movieId"].unique())}
    everyone = [
        (
            torch.tensor(rows["movieId"].map(items).to_numpy()),
            torch.tensor(rows["rating"].to_numpy()).float(),
        )
        for _, rows in table.groupby("userId")
        if len(rows) >= LEAST
    ]
    if len(everyone) < 40:
        raise rnnopt.InputError(
            f"{len(everyone)} users have at least {LEAST} ratings: it needs 40 of them; give more"
        )
    order = np.random.default_rng(seed).permutation(len(everyone))
    ends = np.cumsum([int(share * len(order)) for share in SHARES.values()])
    groups = zip(SHARES, np.split(order, ends))
    return {name: [everyone[i] for i in group] for name, group in groups}, list(items)


def make_model(users: list[Ratings], items: int, options: Options) -> User:
    """The model of the mean user, from the ratings of the users to pretrain on."""
    owners = np.repeat(np.arange(len(users)), [len(rated) for _, rated in users])
    rated_items, ratings = (torch.cat(column).numpy() for column in zip(*users))

    def make() -> dict[str, Tensor]:
        factors = options.more["factors"]
        with progress_bar("pretrain", ROUNDS) as bar:
            found = factorise(owners, rated_items, ratings, items, factors, bar.advance)
        names = ("biases", "vectors", "vector")
        return {name: torch.from_numpy(value).float() for name, value in zip(names, found)}

    facts = {"ratings": len(ratings), "sum": float(ratings.sum()), "users": len(users)}
    facts |= {"seed": options.seed, "factors": options.more["factors"]}
    values = kept(options.output, "recommendation-model", facts, make)
    net = User(values["vectors"], values["biases"])
    net.load_state_dict(values, strict=False)
    return net


def field_of(name: str, title: str, net: User, users: Users, options: Options) -> Field:
    """The field of a model, whose penalty of ridge regression is chosen for each number of ratings.

    Args:
        name: of the field.
        title: above its tables.
        net: the model of the mean user.
        users: see `users_of`.
        options: of the command.
    """
    learner, higher = rnnopt.Learner(net), rnnopt.Metric(higher_is_better=True)

    def task(support: int | None, part: str, number: int, scored: bool) -> Rated:
        drawn = random.Random(f"{options.seed} {part} {number}")
        rated, ratings = users[part][number % len(users[part])]
        size = support or drawn.choice(SUPPORT)
        rows = torch.tensor(drawn.sample(range(len(rated)), min(size + JUDGED, len(rated))))
        seen, asked = rows[:size], rows[size:]
        liked = options.more["liked"]
        return Rated((rated[seen], ratings[seen]), (rated[asked], ratings[asked]), liked, scored)

    def error(size: int, penalty: float) -> float:
        tasks = (task(size, "validation", i, True) for i in range(len(users["validation"])))
        return sum(by_ridge(penalty, learner, one)["rmse"] for one in tasks)

    best = {size: min(PENALTIES, key=functools.partial(error, size)) for size in SUPPORT}
    return Field(
        name,
        title,
        learner,
        functools.partial(task, None),
        metrics={"rmse": rnnopt.Metric(), "ndcg": higher, "auc": higher},
        usual={"Adam at 0.001": at_default(torch.optim.Adam)},
        direct={
            "item mean": functools.partial(by_ridge, np.inf),
            "ridge regression, best penalty": lambda learner, task: by_ridge(
                best[len(task.seen[0])], learner, task
            ),
        },
        settings={f"{size}-ratings": functools.partial(task, size) for size in SUPPORT},
        facts={"users": {part: len(group) for part, group in users.items()}, **options.more},
        budgets=(1, 3, 10),
        steps=10,
        meta_sgd=0.1,
    )


def make_field(options: Options) -> Field:
    """Read the ratings, pretrain the model, and say what a task is.

    Raises:
        InputError: the ratings can't be used.
    """
    users, items = users_of(read_ratings(options.data), options.seed)
    net = make_model(users["pretraining"], len(items), options)
    return field_of("recommendation", "A user whom nobody has seen,", net, users, options)


main = main_of(make_field)

if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=150, episodes=160, more=MORE))

"""What a new user will like, by a two-tower model of the items' texts, from 5, 10 or 20 ratings.

    python examples/fields/towers.py --data Rdata.rdb --encoder MINILM --output out

Ratings are those of recommendation.py, with the further columns title and genres. The tower of the
items is a linear map of the vector that a frozen sentence encoder makes of title and genres; the
tower of the users is a vector for each. Both are pretrained on the ratings of some users. A new
user has a bias, a vector and a matrix between the towers of his own, which begin at 0, at the mean
user and at the identity. Some minutes on two cores, most of them for the vectors, which are kept.
"""

from __future__ import annotations

import random
import sys

import pandas as pd
import recommendation
import torch
from field import Field, Options, command, digest, kept, main_of
from language import pretrain
from recommendation import COLUMNS, Ratings, User, field_of, read_ratings, users_of
from selection import encode
from torch import Tensor, nn
from torch.nn.functional import mse_loss

MORE = {
    **recommendation.MORE,
    "encoder": {"required": True, "help": "a folder of transformers' own"},
}
BATCH = 512  # ratings of a step of pretraining
STEPS = 1000
SHRINKAGE = 5  # ratings of the mean that every item has beside its own
PENALTY = 0.02  # of the mean square of the two vectors of a rating, against the squared error


class Towers(nn.Module):
    """Ratings as biases and the product of an item's tower and a user's vector.

    Shapes: N items, W numbers of the encoder's vector, D factors, U users, B ratings.

    Args:
        texts: vectors of the items, (N, W).
        biases: of the items with the mean rating, (N,).
        users: U.
        factors: D.
    """

    def __init__(self, texts: Tensor, biases: Tensor, users: int, factors: int) -> None:
        super().__init__()
        self.texts, self.biases = texts, biases
        self.tower = nn.Linear(texts.shape[1], factors)
        self.vectors = nn.Parameter(0.1 * torch.randn(users, factors))
        self.user_biases = nn.Parameter(torch.zeros(users))

    def loss(self, users: Tensor, items: Tensor, ratings: Tensor) -> Tensor:
        """Mean squared error on ratings (B,), with a penalty on the vectors that took part."""
        left, right = self.vectors[users], self.tower(self.texts[items])
        found = self.biases[items] + self.user_biases[users] + (left * right).sum(dim=1)
        penalty = PENALTY * (left.square().mean() + right.square().mean())
        return mse_loss(found, ratings) + penalty


def item_vectors(table: pd.DataFrame, items: list[int], options: Options) -> Tensor:
    """The encoder's vectors (N, W) of title and genres, less their mean, of variance 1."""
    first = table.drop_duplicates("movieId").set_index("movieId").loc[items].fillna("")
    genres = first["genres"].str.replace("|", ", ")
    texts = [f"{title}. {kind}" for title, kind in zip(first["title"], genres)]
    encoder = options.more["encoder"]
    facts = {"texts": digest({"texts": texts}), "encoder": encoder}
    x = kept(options.output, "towers-texts", facts, lambda: {"x": encode(texts, encoder)})["x"]
    x = x - x.mean(dim=0)
    return x / x.std()


def make_model(texts: Tensor, users: list[Ratings], options: Options) -> User:
    """The model of the mean user, from the ratings of the users to pretrain on.

    The tower is scaled so that the vectors of users have a standard deviation of 1 in each factor.
    """
    owners = torch.arange(len(users)).repeat_interleave(torch.tensor([len(r) for _, r in users]))
    items, ratings = (torch.cat(column) for column in zip(*users))
    count, mean = len(texts), float(ratings.mean())
    sums = torch.zeros(count).index_add(0, items, ratings - mean)
    biases = mean + sums / (torch.bincount(items, minlength=count) + SHRINKAGE)

    def make() -> dict[str, Tensor]:
        torch.manual_seed(options.seed)
        towers = Towers(texts, biases, len(users), options.more["factors"])

        def loss(drawn: random.Random) -> Tensor:
            rows = torch.tensor(drawn.choices(range(len(items)), k=BATCH))
            return towers.loss(owners[rows], items[rows], ratings[rows])

        pretrain(towers, loss, 3 if options.small else STEPS, 1e-2, options.seed)
        with torch.no_grad():
            scale = towers.vectors.std(dim=0)
            return {
                "vectors": towers.tower(texts) * scale,
                "vector": towers.vectors.mean(dim=0) / scale,
            }

    facts = {"ratings": len(ratings), "sum": float(ratings.sum()), "users": len(users)}
    facts |= {"seed": options.seed, "steps": 3 if options.small else STEPS, **options.more}
    values = kept(options.output, "towers-model", facts, make)
    net = User(values["vectors"], biases)
    net.load_state_dict({"vector": values["vector"]}, strict=False)
    return net


def make_field(options: Options) -> Field:
    """Read the ratings, encode the items, pretrain the towers, and say what a task is.

    Raises:
        InputError: the ratings or the encoder can't be used.
    """
    table = read_ratings(options.data, (*COLUMNS, "title", "genres"))
    users, items = users_of(table, options.seed)
    net = make_model(item_vectors(table, items, options), users["pretraining"], options)
    return field_of("towers", "A new user, by towers,", net, users, options)


main = main_of(make_field)

if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=150, episodes=160, more=MORE))

"""Response selection: find the next utterance among ten, in a topic or language never seen.

    python examples/fields/selection.py --data daily_dialogue --encoder MINILM --output out

A frozen sentence encoder, such as all-MiniLM-L6-v2, makes vectors of what was said and of the next
utterance. Above it, two low-rank towers learn which belong together, pretrained on the dialogues of
some topics. Every method then adapts the towers to 4 to 32 dialogues of another topic, or language.

Some minutes on two cores, most of them for the vectors, which are kept in the output folder. Prints
the loss, in nats, and recall@1 of 10: how often the utterance that was said has the highest score.
"""

from __future__ import annotations

import functools
import random
import sys

import dialogue
import torch
import transformers
from dialogue import Dialogue, pools
from field import Field, Options, at_default, command, kept, main_of, unadapted
from language import pretrain
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import rnnopt
from rnnopt.cli.progress import progress_bar
from rnnopt.evaluation.baselines import BASELINES
from rnnopt.tasks.text.encoder.loading import silence

MORE = {
    **dialogue.MORE,
    "encoder": {"required": True, "help": "a folder of transformers' own"},
}
RANK, LONGEST, BATCH = 32, 64, 32  # of the towers; tokens of a text; utterances a step
EACH = 1  # utterances of a dialogue that are used
QUERY, CANDIDATES = 16, 10  # utterances that judge, and what each is found among

Pair = tuple[str, str]  # what was said, the next utterance


class Towers(nn.Module):
    """Scores of utterances: cosines of vectors, each changed by a low-rank map of its tower.

    Args:
        width: the size D of the vectors.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.ParameterList(
            nn.Parameter(torch.randn(width, RANK) / width**0.5) for _ in "cr"
        )
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(RANK, width)) for _ in "cr")
        self.sharpness = nn.Parameter(torch.tensor(3.0))  # log of the factor on a cosine

    def forward(self, said: Tensor, utterances: Tensor) -> Tensor:
        """Scores, (B, C), of utterances (B, C, D), or (C, D), after what was said, (B, D)."""
        left, right = (
            normalize(x + x @ down @ up, dim=-1)
            for x, down, up in zip((said, utterances), self.down, self.up)
        )
        scores = left @ right.T if right.dim() == 2 else (right @ left.unsqueeze(-1)).squeeze(-1)
        return self.sharpness.exp() * scores


def recall(scores: Tensor) -> float:
    """How often the first of several scores, (B, C), is the largest; a tie or NaN is a failure."""
    return float((scores[:, :1] > scores[:, 1:]).all(dim=1).float().mean())


def pairs_of(turns: list[str]) -> list[Pair]:
    """Some utterances of a dialogue, each with the two before it."""
    drawn = random.Random(" ".join(turns))
    places = drawn.sample(range(1, len(turns)), min(EACH, len(turns) - 1))
    return [(" ".join(turns[max(0, at - 2) : at]), turns[at]) for at in places]


@torch.no_grad()
def encode(texts: list[str], encoder: str) -> Tensor:
    """Mean-pooled vectors of texts, (N, D)."""
    try:
        with silence():
            tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
            model = transformers.AutoModel.from_pretrained(encoder).eval()
    except (OSError, ValueError) as error:
        raise rnnopt.InputError(
            f"--encoder {encoder}: is no encoder of transformers ({str(error).splitlines()[0]}); "
            "name a folder with config.json, weights and tokenizer"
        ) from error
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    found: dict[int, Tensor] = {}
    with progress_bar("vectors", len(texts)) as bar:
        for first in range(0, len(texts), BATCH):
            places = order[first : first + BATCH]
            batch = tokenizer(
                [texts[at] for at in places], padding=True, truncation=True, max_length=LONGEST,
                return_tensors="pt",
            )  # fmt: skip
            mask = batch["attention_mask"].unsqueeze(-1)
            states = model(**batch).last_hidden_state * mask
            found |= zip(places, states.sum(dim=1) / mask.sum(dim=1))
            bar.at(first + len(places))
    return normalize(torch.stack([found[at] for at in range(len(texts))]), dim=-1)


def vectors_of(pool: dict[str, list[Dialogue]], options: Options) -> dict[str, Tensor]:
    """The vector of every text that a pair of the dialogues has."""
    texts = sorted(
        {t for part in pool.values() for d in part for p in pairs_of(d.turns) for t in p}
    )
    encoder = options.more["encoder"]
    facts = {"texts": texts, "encoder": encoder}
    made = kept(options.output, "selection-vectors", facts, lambda: {"x": encode(texts, encoder)})
    return dict(zip(texts, made["x"]))


def stacked(vectors: dict[str, Tensor], pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """The vectors of what is said, and of what follows, (pairs, H) each."""
    said, following = zip(*pairs)
    return (
        torch.stack([vectors[text] for text in said]),
        torch.stack([vectors[text] for text in following]),
    )


def pretrained(vectors: dict[str, Tensor], known: list[Pair], options: Options) -> Towers:
    """Towers that have learned which of the pairs belong together."""
    torch.manual_seed(options.seed)
    towers = Towers(len(next(iter(vectors.values()))))

    def loss(drawn: random.Random) -> Tensor:
        drawn_pairs = drawn.sample(known, min(2 * BATCH, len(known)))
        scores = towers(*stacked(vectors, drawn_pairs))
        return cross_entropy(scores, torch.arange(len(scores)))

    steps = 3 if options.small else 300
    facts = {"pairs": len(known), "steps": steps, "seed": options.seed, **options.more}
    towers.load_state_dict(
        kept(
            options.output, "selection-model", facts,
            lambda: pretrain(towers, loss, steps, 1e-3, options.seed),
        )
    )  # fmt: skip
    return towers


def episode(
    vectors: dict[str, Tensor], chosen: list[dialogue.Turns], drawn: random.Random, scored: bool
) -> rnnopt.Task:
    """A task of dialogues: the first `QUERY` judge, and the others are learned from."""
    support = [pair for turns in chosen[QUERY:] for pair in pairs_of(turns)]
    drawn.shuffle(support)
    batches = [stacked(vectors, support[at : at + BATCH]) for at in range(0, len(support), BATCH)]
    said, right = stacked(vectors, [drawn.choice(pairs_of(turns)) for turns in chosen[:QUERY]])
    wrong = [
        drawn.sample([i for i in range(QUERY) if i != at], CANDIDATES - 1) for at in range(QUERY)
    ]
    candidates = right[torch.tensor([[at, *others] for at, others in enumerate(wrong)])]
    first = torch.zeros(QUERY, dtype=torch.long)

    def support_loss(net: nn.Module, step: int) -> Tensor:
        scores = net(*batches[step % len(batches)])
        return cross_entropy(scores, torch.arange(len(scores)))

    def metrics(net: nn.Module) -> dict[str, float]:
        return {"recall@1": recall(net(said, candidates))}

    return rnnopt.Task(
        support_loss,
        lambda net, step: cross_entropy(net(said, candidates), first),
        metrics=metrics if scored else None,
    )


def make_field(options: Options) -> Field:
    """Read the data, encode it, pretrain the towers, and say what a task is.

    Raises:
        InputError: the data or the encoder can't be used.
    """
    pool, sizes = pools(options), options.more["dialogues"]
    groups = {
        (part, setting): dialogue.groups_of(part, found, setting, max(sizes) + QUERY)
        for part, found in pool.items()
        for setting in ("topic", "language")
        if part != "pretrain"
    }
    vectors = vectors_of(pool, options)
    known = [pair for d in pool["pretrain"] for pair in pairs_of(d.turns)]

    def task(setting: str | None, part: str, number: int, scored: bool) -> rnnopt.Task:
        drawn = random.Random(f"{options.seed} {part} {number}")
        setting, size = setting or drawn.choice(["topic", "language"]), drawn.choice(sizes)
        group = drawn.choice(groups[setting if part == "test" else part, setting])
        return episode(vectors, drawn.sample(group, size + QUERY), drawn, scored)

    return Field(
        "selection",
        "Response selection among ten, of an unseen",
        rnnopt.Learner(pretrained(vectors, known, options)),
        functools.partial(task, None),
        metrics={"recall@1": rnnopt.Metric(higher_is_better=True)},
        usual={
            "adam-default": at_default(torch.optim.Adam),
            "adamw-default": BASELINES["adamw-default"],
        },
        direct={"none": unadapted},
        meta_sgd=0.1,
        slower=2,
        settings={name: functools.partial(task, name) for name in ("topic", "language")},
        facts={"pairs": len(known), **options.more},
    )


main = main_of(make_field)

if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=60, episodes=24, more=MORE))

"""Dialogue: adapt a language model to an unseen topic, or an unseen language, from a few dialogues.

    python examples/fields/dialogue.py --data daily_dialogue --output out

A small GPT-2 is pretrained on the dialogues of some topics in two languages. Every method then
adapts all its weights to 4 to 32 dialogues of a topic, or of a language, that it has not seen, and
is judged by the perplexity of the next utterance of others. What is meta-trained adapts to held-out
dialogues of the training topics and to languages that nobody speaks; learning rates are tuned on a
further topic. For choosing the next utterance see selection.py.

About 15 minutes on two cores; pretraining is kept in the output folder. Prints loss and perplexity.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from dataclasses import dataclass

import torch
import transformers
from field import Field, Options, at_default, command, kept, main_of, unadapted
from language import END, IGNORED, cipher, find, padded, pretrain, rows, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn

import rnnopt
from rnnopt.evaluation.baselines import BASELINES

MORE = {
    "languages": {"default": ["en", "de"], "nargs": "+", "help": "pretrained on [%(default)s]"},
    "unseen_language": {"default": "it", "help": "[%(default)s]"},
    "unseen_topics": {"default": ["tourism", "finance", "health"], "nargs": "+"},
    "tuning_topics": {"default": ["relationship"], "nargs": "+", "help": "[%(default)s]"},
    "dialogues": {"default": [4, 8, 16, 32], "nargs": "+", "type": int, "help": "to learn from"},
}
WIDTH, LAYERS, TOKENS = 80, 2, 1500  # of the model
CONTEXT, RESPONSE = 32, 24  # tokens that are kept of each
BATCH = 32  # next utterances a step
QUERY = 16  # dialogues that judge, by an utterance each

Turns = list[str]
Example = tuple[list[int], list[int]]  # tokens of what was said, and of the next utterance


@dataclass(frozen=True)
class Dialogue:
    """A dialogue with its topic and language."""

    turns: Turns
    topic: str
    language: str


def read(options: Options, stem: str) -> list[Dialogue]:
    """The dialogues of a file."""
    found = []
    for where, row in rows(find(options.data, stem)):
        turns = row.get("turns")
        if isinstance(turns, str):  # a cell of a TSV file
            turns = turns.split(" | ")
        if not isinstance(turns, list) or len(turns) < 2:
            raise rnnopt.InputError(
                f"{where}: turns={turns!r}: a dialogue needs a list of at least 2 utterances, one "
                "and its answer; add them or delete the row"
            )
        for number, turn in enumerate(turns, 1):
            if not isinstance(turn, str) or not turn.strip():
                raise rnnopt.InputError(
                    f"{where}: utterance {number} is {turn!r}, and needs some text; fill it in or "
                    "delete the row"
                )
        for name in ("topic", "language"):
            if not isinstance(row.get(name), str):
                raise rnnopt.InputError(
                    f"{where}: {name}={row.get(name)!r}: must be text; say what the dialogue is "
                    "about and in which language"
                )
        found.append(Dialogue(turns, row["topic"], row["language"]))
    return found


@dataclass
class Speaker:
    """The language model with its tokenizer."""

    model: nn.Module
    tokenizer: Tokenizer

    def examples(self, turns: Turns) -> list[Example]:
        """Each utterance but the first, with the end of what was said before it."""
        end = self.tokenizer.token_to_id(END)
        said = [[*self.tokenizer.encode(turn).ids[: RESPONSE - 1], end] for turn in turns]
        return [
            ([token for turn in said[:at] for token in turn][-CONTEXT:], said[at])
            for at in range(1, len(said))
        ]

    @staticmethod
    def batch(examples: list[Example]) -> dict[str, Tensor]:
        """Tokens and labels; only the next utterance has labels."""
        inputs = padded([[*context, *response] for context, response in examples])
        labels = padded(
            [[*[IGNORED] * len(context), *response] for context, response in examples], IGNORED
        )
        return {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": labels}


def make_speaker(training: list[Dialogue], options: Options) -> Speaker:
    """The pretrained model."""
    tokenizer = train_tokenizer((turn for d in training for turn in d.turns), TOKENS)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_embd=WIDTH, n_layer=LAYERS, n_head=4,
        n_positions=CONTEXT + RESPONSE, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(options.seed)
    speaker = Speaker(transformers.GPT2LMHeadModel(config).eval(), tokenizer)
    examples = [example for d in training for example in speaker.examples(d.turns)]

    size = min(2 * BATCH, len(examples))

    def loss(drawn: random.Random) -> Tensor:
        return speaker.model(**speaker.batch(drawn.sample(examples, size))).loss

    steps = 3 if options.small else 1200
    facts = {"dialogues": len(training), "steps": steps, "seed": options.seed, **options.more}
    values = kept(
        options.output, "dialogue-model", {**facts, "config": config.to_diff_dict()},
        lambda: pretrain(speaker.model, loss, steps, 3e-3, options.seed),
    )  # fmt: skip
    speaker.model.load_state_dict(values, strict=False)
    return speaker


def episode(speaker: Speaker, support: list[Turns], query: list[Turns], seed: str, scored: bool):
    """Adapt to dialogues, and be judged by one utterance of each of others."""
    drawn = random.Random(seed)
    examples = [example for turns in support for example in speaker.examples(turns)]
    drawn.shuffle(examples)
    batches = [speaker.batch(examples[at : at + BATCH]) for at in range(0, len(examples), BATCH)]
    judged = [drawn.choice(speaker.examples(turns)) for turns in query]
    batch = speaker.batch(judged)

    def metrics(module: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"perplexity": math.exp(min(float(module(**batch).loss), 10.0))}

    return rnnopt.Task(
        lambda net, step: net(**batches[step % len(batches)]).loss,
        lambda net, step: net(**batch).loss,
        metrics=metrics if scored else None,
    )


def pools(options: Options) -> dict[str, list[Dialogue]]:
    """The dialogues of each part. No topic that is tested or tuned on is in another part."""
    dialogues, more = [d for stem in ("train", "test") for d in read(options, stem)], options.more
    known, unseen, tuning = more["languages"], more["unseen_topics"], more["tuning_topics"]
    seen = [d for d in dialogues if d.language in known and d.topic not in (*unseen, *tuning)]
    tested = [d for d in dialogues if d.topic in unseen]
    return {
        "pretrain": [d for i, d in enumerate(seen) if i % 4],
        "train": seen[::4],
        "validation": [d for d in dialogues if d.language in known and d.topic in tuning],
        "topic": [d for d in tested if d.language == known[0]],
        "language": [d for d in tested if d.language == more["unseen_language"]],
    }


def groups_of(part: str, pool: list[Dialogue], setting: str, least: int) -> list[list[Turns]]:
    """What an episode may draw from: dialogues of one language and topic, or of one language."""
    groups: dict[tuple[str, str], list[Turns]] = {}
    for d in pool:
        key = d.language, d.topic if setting == "topic" else ""
        groups.setdefault(key, []).append(d.turns)
    found = [groups[key] for key in sorted(groups) if len(groups[key]) >= least]
    if not found:
        most = max(map(len, groups.values()), default=0)
        raise rnnopt.InputError(
            f"{part}: the largest group of one language and topic has {most} dialogues, and an "
            f"episode needs {least}; choose other topics or languages, or fewer --dialogues"
        )
    return found


def make_field(options: Options) -> Field:
    """Read the data, pretrain the model, and say what a task is.

    Raises:
        InputError: the data can't be used.
    """
    pool, sizes = pools(options), options.more["dialogues"]
    groups = {
        (part, setting): groups_of(part, found, setting, max(sizes) + QUERY)
        for part, found in pool.items()
        if part != "pretrain"
        for setting in ("topic", "language")
    }
    speaker = make_speaker(pool["pretrain"], options)

    def task(setting: str | None, part: str, number: int, scored: bool) -> rnnopt.Task:
        seed = f"{options.seed} {part} {number}"
        drawn = random.Random(seed)
        setting, size = setting or drawn.choice(["topic", "language"]), drawn.choice(sizes)
        group = drawn.choice(groups[setting if part == "test" else part, setting])
        chosen = drawn.sample(group, size + QUERY)
        if setting == "language" and part != "test":
            letters = cipher(drawn.getrandbits(32))
            chosen = [[turn.translate(letters) for turn in turns] for turns in chosen]
        return episode(speaker, chosen[QUERY:], chosen[:QUERY], seed, scored)

    return Field(
        "dialogue",
        "The next utterance, of",
        rnnopt.Learner(speaker.model),
        functools.partial(task, None),
        metrics={"perplexity": rnnopt.Metric(tuned_by="loss")},
        usual={
            "adamw-default": BASELINES["adamw-default"],
            "adafactor-default": at_default(torch.optim.Adafactor),
        },
        direct={"none": unadapted},
        meta_sgd=0.1,
        slower=4,
        settings={name: functools.partial(task, name) for name in ("topic", "language")},
        facts={"dialogues": {name: len(found) for name, found in pool.items()}, **options.more},
    )


main = main_of(make_field)

if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=40, episodes=12, more=MORE))

"""Machine translation: adapt to a language that the model has never seen, from 16 to 256 pairs.

    python examples/fields/translation.py --data multi30k --output out

A small Marian transformer is pretrained on English to German and to French. Every method then
adapts its cross-attention and embeddings (Gheini et al. 2021, arXiv:2104.08771) to Czech. What is
meta-trained adapts to languages that nobody speaks, German and French with their letters exchanged,
and learning rates are tuned on further ones. Episodes take sentences that were not pretrained on.

About 15 minutes on two cores; pretraining is kept in the output folder. Prints loss, chrF and BLEU.
"""

from __future__ import annotations

import functools
import random
import sys
from dataclasses import dataclass

import sacrebleu
import torch
import transformers
from field import Field, Options, at_default, command, kept, main_of, unadapted
from language import END, IGNORED, START, cipher, find, padded, pretrain, rows, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn

import rnnopt
from rnnopt.evaluation.baselines import BASELINES

MORE = {
    "source": {"default": "en", "help": "the language to translate from [%(default)s]"},
    "known": {"default": ["de", "fr"], "nargs": "+", "help": "pretrained targets [%(default)s]"},
    "unseen": {"default": "cs", "help": "the target to adapt to [%(default)s]"},
    "pairs": {"default": [64], "nargs": "+", "type": int, "help": "pairs to learn from [64]"},
    "pretraining_steps": {"default": 1200, "type": int, "help": "[%(default)s]"},
    "prefix": {"default": "", "help": "of the files' names, such as parallel. [none]"},
}
WIDTH, LAYERS, TOKENS, LONGEST = 96, 2, 2000, 56  # of the model; LONGEST in tokens
BATCH = 32  # pairs a step
TRAINED = (16, 32, 64, 128)  # pairs of the episodes of meta-training
QUERY = 16  # pairs that judge
HELD_OUT = 0.2  # share of the training pairs that episodes have to themselves
UNSEEN = "<unseen>"  # the tag of the language to adapt to

Pair = tuple[str, str]


def read(options: Options, stem: str) -> list[dict[str, str]]:
    """The rows of a file, each with a sentence in every language."""
    more, found = options.more, []
    languages = [more["source"], *more["known"], more["unseen"]]
    for where, row in rows(find(options.data, f"{more['prefix']}{stem}")):
        for language in languages:
            text = row.get(language)
            if not isinstance(text, str) or not text.strip():
                raise rnnopt.InputError(
                    f"{where}: {language!r} is {'empty' if language in row else 'missing'}, the "
                    f"columns are {', '.join(row)}; a pair needs both sentences: fill it in, "
                    "delete the row, or name other languages with --source, --known, --unseen"
                )
        found.append(row)
    return found


@dataclass
class Translator:
    """The model with its tokenizer."""

    model: nn.Module
    tokenizer: Tokenizer

    def source(self, text: str, tag: str) -> list[int]:
        ids = self.tokenizer.encode(text).ids[: LONGEST - 2]
        return [self.tokenizer.token_to_id(tag), *ids, self.tokenizer.token_to_id(END)]

    def batch(self, pairs: list[Pair], tag: str) -> dict[str, Tensor]:
        """A batch with labels, as transformers takes it."""
        inputs = padded([self.source(source, tag) for source, _ in pairs])
        end = self.tokenizer.token_to_id(END)
        targets = [[*self.tokenizer.encode(to).ids[: LONGEST - 1], end] for _, to in pairs]
        return {
            "input_ids": inputs,
            "attention_mask": (inputs != 0).long(),
            "labels": padded(targets, IGNORED),
        }

    @torch.no_grad()
    def translate(self, module: nn.Module, batch: dict[str, Tensor]) -> list[str]:
        """Greedy decoding."""
        encoded = module.get_encoder()(batch["input_ids"], batch["attention_mask"])
        start, end = (self.tokenizer.token_to_id(token) for token in (START, END))
        found = torch.full((len(batch["input_ids"]), 1), start)
        past, done = None, torch.zeros(len(found), dtype=torch.bool)
        for _ in range(LONGEST):
            output = module(
                encoder_outputs=encoded, attention_mask=batch["attention_mask"],
                decoder_input_ids=found[:, -1:], past_key_values=past, use_cache=True,
            )  # fmt: skip
            past = output.past_key_values
            chosen = output.logits[:, -1].argmax(dim=-1).masked_fill(done, 0)
            found = torch.cat([found, chosen.unsqueeze(1)], dim=1)
            done |= chosen == end
            if done.all():
                break
        return [self.tokenizer.decode(ids).strip() for ids in found.tolist()]


def make_translator(training: list[dict[str, str]], options: Options) -> Translator:
    """The pretrained model, whose tag for the unseen language is the mean of the known ones."""
    source, known = options.more["source"], options.more["known"]
    tags = [f"<{language}>" for language in known]
    texts = (row[language] for row in training for language in (source, *known))
    tokenizer = train_tokenizer(texts, TOKENS, [*tags, UNSEEN])
    config = transformers.MarianConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=WIDTH,
        encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=LONGEST + 1, dropout=0.0, scale_embedding=True,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(options.seed)
    model = transformers.MarianMTModel(config).eval()
    translator = Translator(model, tokenizer)

    size = min(2 * BATCH, len(training))

    def loss(drawn: random.Random) -> Tensor:
        language = drawn.choice(known)
        chosen = [(row[source], row[language]) for row in drawn.sample(training, size)]
        return model(**translator.batch(chosen, f"<{language}>")).loss

    steps = 3 if options.small else options.more["pretraining_steps"]
    facts = {"rows": len(training), "known": known, "steps": steps, "seed": options.seed}
    values = kept(
        options.output, "translation-model", {**facts, "config": config.to_diff_dict()},
        lambda: pretrain(model, loss, steps, 3e-3, options.seed),
    )  # fmt: skip
    model.load_state_dict(values, strict=False)
    with torch.no_grad():
        shared = model.get_input_embeddings().weight
        ids = [tokenizer.token_to_id(tag) for tag in tags]
        shared[tokenizer.token_to_id(UNSEEN)] = shared[ids].mean(dim=0)
    return translator


def translation_scores(found: list[str], query: list[Pair]) -> dict[str, float]:
    """chrF and BLEU of translations by sacrebleu."""
    wanted = [[to for _, to in query]]
    return {
        "chrF": sacrebleu.corpus_chrf(found, wanted).score,
        "BLEU": sacrebleu.corpus_bleu(found, wanted).score,
    }


class Episode(rnnopt.Task):
    """Adapt to pairs, and be judged by others."""

    def __init__(
        self, translator: Translator, support: list[Pair], query: list[Pair], scored: bool
    ) -> None:
        batches = [
            translator.batch(support[at : at + BATCH], UNSEEN)
            for at in range(0, len(support), BATCH)
        ]
        judged, self.query = translator.batch(query, UNSEEN), query

        def metrics(module: nn.Module) -> dict[str, float]:
            return translation_scores(translator.translate(module, judged), query)

        super().__init__(
            lambda net, step: net(**batches[step % len(batches)]).loss,
            lambda net, step: net(**judged).loss,
            metrics=metrics if scored else None,
        )


def copied(learner: rnnopt.Learner, task: Episode) -> dict[str, float]:
    """The sources as they are for translations; the loss is that of the model, not adapted."""
    found = translation_scores([source for source, _ in task.query], task.query)
    return unadapted(learner, task) | found


def make_field(options: Options) -> Field:
    """Read the data, pretrain the model, and say what a task is.

    Raises:
        InputError: the data can't be used.
    """
    training, support, query = (read(options, stem) for stem in ("train", "val", "test"))
    source, known, unseen = (options.more[name] for name in ("source", "known", "unseen"))
    sizes = options.more["pairs"]
    needed = max(sizes) + QUERY
    held = max(int(len(training) * HELD_OUT), 2 * needed)
    cut = held - max(held - held * 3 // 4, needed)
    episodes = {"train": training[:cut], "validation": training[cut:held]}
    for name, found, least in (("train", training, 2 * held), ("val", support, max(sizes))):
        if len(found) < least:
            raise rnnopt.InputError(
                f"--pairs {max(sizes)}: {name} has {len(found)} rows, and needs {least}; give more "
                "rows, or lower --pairs"
            )
    translator = make_translator(training[held:], options)
    module = translator.model
    trains = [
        name for name, _ in module.named_parameters() if "encoder_attn." in name or "shared" in name
    ]

    def task(size: int | None, part: str, number: int, scored: bool) -> rnnopt.Task:
        drawn = random.Random(f"{options.seed} {part} {number}")
        size = drawn.choice(TRAINED) if size is None else size
        if part == "test":
            first = [(row[source], row[unseen]) for row in drawn.sample(support, size)]
            second = [(row[source], row[unseen]) for row in drawn.sample(query, QUERY)]
        else:
            letters, to = cipher(drawn.getrandbits(32)), drawn.choice(known)
            chosen = drawn.sample(episodes[part], min(size + QUERY, len(episodes[part])))
            pairs = [(row[source], row[to].translate(letters)) for row in chosen]
            first, second = pairs[QUERY:], pairs[:QUERY]
        return Episode(translator, first, second, scored)

    higher = rnnopt.Metric(higher_is_better=True)
    return Field(
        "translation",
        f"Translation from {source} to {unseen}, which was never seen.",
        rnnopt.Learner(module, trains=trains),
        functools.partial(task, None),
        metrics={"chrF": higher, "BLEU": rnnopt.Metric(higher_is_better=True, tuned_by="chrF")},
        usual={
            "adafactor-default": at_default(torch.optim.Adafactor),
            "adamw-default": BASELINES["adamw-default"],
        },
        direct={"none": unadapted, "source copied": copied},
        meta_sgd=0.1,
        slower=3,
        settings={f"{size}-pairs": functools.partial(task, size) for size in sizes},
        facts={
            "rows": [len(training), len(support), len(query)],
            "languages": [source, *known, unseen],
        },
    )


main = main_of(make_field)

if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=24, episodes=8, more=MORE))

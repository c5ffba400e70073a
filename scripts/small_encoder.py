"""A small BERT that no rule has seen, trained from nothing by masked-language modelling.

    python scripts/small_encoder.py --data DATA/clinc150 DATA/huffpost36 --output small-bert
    python scripts/benchmark_beyond.py --encoder small-bert --conditions plain ...

Every text of train classes is read, none of other classes. The encoder is of another width, depth
and vocabulary than the one that the shipped rules were meta-trained on, and knows far less.
--output is a folder that `AutoModel.from_pretrained` loads, tokenizer included.

Time: about 20 minutes on one core of a server processor. Memory: 2 GiB.
Last line: the loss of the last hundred batches, in nats for each masked token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

from rnnopt.data.splits import read_splits
from rnnopt.tasks.text.encoder.loading import seeded, silence, word_piece

VOCABULARY = 4000
TOKENS = 32  # of a text
LEARNING_RATE = 1e-3
WARM_UP = 0.1  # of all steps
LAST = 100  # batches of which the loss is told


def train(texts: Sequence[str], folder: Path, options: argparse.Namespace) -> float:
    """Write the encoder; the mean loss of the last batches, in nats a masked token."""
    tokenizer = word_piece(texts, vocab_size=VOCABULARY, max_length=TOKENS)
    rows = [{"input_ids": row} for row in tokenizer(list(texts), truncation=True)["input_ids"]]
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, num_hidden_layers=options.layers,
        num_attention_heads=4, intermediate_size=4 * options.width,
        max_position_embeddings=TOKENS, pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    losses = []
    with seeded(options.seed):
        model = BertForMaskedLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=options.steps, pct_start=WARM_UP
        )
        batches = torch.utils.data.DataLoader(
            rows, options.batch_size, shuffle=True,
            collate_fn=DataCollatorForLanguageModeling(tokenizer),
        )  # fmt: skip
        endless = chain.from_iterable(repeat(batches))  # masked anew each time
        for batch in tqdm(islice(endless, options.steps), total=options.steps):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    with silence():
        model.bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return statistics.fmean(losses[-LAST:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, nargs="+", metavar="FOLDER")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    for name, default in (
        ("width", 192), ("layers", 4), ("batch-size", 32), ("steps", 6000), ("seed", 0)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    options = parser.parse_args(arguments)
    loss = train(read_splits(options.data).train.texts, options.output, options)
    print(f"{options.output}: {loss:.2f} nats a masked token")
    return 0


if __name__ == "__main__":
    sys.exit(main())

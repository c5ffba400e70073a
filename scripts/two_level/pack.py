"""Pack what train.py and evaluate.py read into a few megabytes, for a machine with nothing on it.

    python scripts/two_level/pack.py --data DATA --encoder MINILM --cache CACHE --output PACK
    python scripts/two_level/train.py --encoder PACK/encoder --cache PACK --device cuda ...

DATA, MINILM and CACHE are those of prepare.py, which has to run before. PACK gets

    encoder/            MiniLM in half precision, without the words that no text has
    small_*             the distilled encoders, the same
    train.safetensors   up to 80 texts of each training class, as tokens: their hidden states are
                        computed when they are drawn, which a GPU does in milliseconds
    val.safetensors     up to 60 of each validation class
    test.safetensors    up to 60 of each test class, which train.py never reads

Time: 20 s of one core. Last line: "PACK: 40.1 MB, 21,000 texts, 15,000 words", or other counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from encoder import Encoder, read_encoder, read_small, save_small
from prepare import TEST, TRAIN, VALIDATION, collect, tokenised
from safetensors.torch import load_file, save_file
from texts import SHORT, Sources, Texts
from torch import Tensor
from transformers import AutoTokenizer

MOST = {"train": 80, "val": 60, "test": 60}  # texts of a class
SPLITS = {"train": TRAIN, "val": VALIDATION, "test": TEST}
WORDS = "embeddings.word_embeddings.weight"


def pack_texts(sources: Sources, tokens: Tensor, lengths: Tensor, words: Tensor) -> Texts:
    """Texts with the numbers of words among `words`, and nothing cached."""
    renumbered = torch.searchsorted(words, tokens.long()).int()
    long = torch.nonzero(lengths > SHORT).flatten()
    return Texts(sources, renumbered, lengths, {}, long, {}, torch.zeros(0))


def pack_encoder(folder: Path, words: Tensor, output: Path) -> None:
    """A Hugging Face encoder in half precision with these words only."""
    output.mkdir(parents=True, exist_ok=True)
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith(WORDS))
    stored[name] = stored[name][words]
    tensors = {
        name: (leaf.half() if leaf.is_floating_point() else leaf).contiguous()
        for name, leaf in stored.items()
    }
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    (output / "config.json").write_text((folder / "config.json").read_text())


def pack_small(path: Path, teacher: Encoder, output: Path) -> None:
    """A distilled encoder; its word embeddings are a linear map of its teacher's."""
    small = read_small(path, teacher)
    weights = {name: leaf.half() for name, leaf in small.weights.items()}
    own = (small.words, small.positions.half(), small.scale.half(), small.shift.half())
    packed = Encoder(small.name, weights, small.heads, *own, True, small.vocabulary)
    projection = torch.linalg.lstsq(F.pad(teacher.words, (0, 1), value=1.0), small.words).solution
    save_small(output / path.name, packed, projection)


def main(words: Sequence[str] | None = None) -> None:
    """Pack everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the sources")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--cache", type=Path, required=True, help="folder that prepare.py filled")
    parser.add_argument("--output", type=Path, required=True, help="folder to fill")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    found = {}
    for split, names in SPLITS.items():
        sources, texts = collect(options.data, names, split, MOST[split])
        found[split] = (sources, *tokenised(tokenizer, texts))
    used = torch.cat([tokens.unique() for _, tokens, _ in found.values()]).unique().long()
    pack_encoder(options.encoder, used, options.output / "encoder")
    teacher = read_encoder(options.encoder)
    for path in sorted(options.cache.glob("small_*.safetensors")):
        pack_small(path, teacher, options.output)
    for split, (sources, tokens, lengths) in found.items():
        pack_texts(sources, tokens, lengths, used).save(options.output / f"{split}.safetensors")
        print(f"{split}: {json.dumps({name: len(own) for name, own in sources.items()})}")
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    count = sum(len(tokens) for _, tokens, _ in found.values())
    print(f"PACK: {size / 1e6:.1f} MB, {count:,} texts, {len(used):,} words")


if __name__ == "__main__":
    main()

"""Make the rules that ship with rnnopt: for a linear head alone, and for all else.

    python scripts/meta_train.py --data DATA --encoder MINILM --output runs/shipped

DATA is a folder that holds those of `SOURCES`, each a folder with train, val and test files of
disjoint classes: intents (CLINC150, Larson et al. 2019; Liu et al. 2019), headlines (HuffPost,
Misra 2018) and newswire (Reuters-21578), in the class splits of few-shot work (Dopierre et al.
2021, Bao et al. 2020). Only train is meta-trained on, val chooses the rule, test is never read into
a task. MINILM is all-MiniLM-L6-v2, a hub name or a folder. Everything else is fixed here. Add
--resume to go on after a stop: it ends with the same weights, bit for bit on one machine.

One run, on heads alone, makes both. It begins as gradient descent at the model's scale, whose steps
stay in the span of the texts' features: that suits a head. The second rule takes over the growth
that was learned, at a fifth, or faster where it promises more than half a nat, and for 20 steps in
place of 8, with Adam's directions and state, orthogonalized in narrow matrices: an encoder below a
head that soon is sure has no reason left to learn. What is in
shipped/ in the output folder goes to rnnopt/weights/; where the run began is beside that folder, in
DIR.start.safetensors.

Time: 8 minutes on one core of a server processor. Memory: 3 GiB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from rnnopt.cli.main import main
from rnnopt.rules.files import SHIPPED_HEAD_RULE, SHIPPED_RULE, load_rule, read_training, save_rule
from rnnopt.rules.lstm import CoordinateLSTM

SOURCES = ("clinc150", "liu54", "huffpost36", "reuters31")
RECIPE = """
--tune head --exact head --ways 2 3 4 5 8 10 15 --shots 1 1 2 5 10 --most-support 40 --queries 3
--batch-size 1000 1000 8 4 --max-length 32 --steps 20 --shortest 3 --judged 0.5 --loss-scale 1.5
--calibrated 0.5 --sure-from 4 --order 1 --clip 0.2 --tasks 4 --meta-steps 120 --meta-lr 6e-3
--validate-every 40 --validation-tasks 16 --precision fp32 --device cpu --seed 0
"""
# Growth where an encoder learns below the head, chosen on validation classes: so slow, a head of
# many classes takes longer, or is hurried where growth promises more than half a nat.
SLOWER, LONGEST, GROWTH_THRESHOLD = 0.2, 20, 0.5


def gradient_descent(path: Path, hidden_size: int) -> None:
    """Write a new rule whose output is the plain gradient's direction."""
    torch.manual_seed(0)
    rule = CoordinateLSTM(hidden_size=hidden_size)
    with torch.no_grad():
        rule.output_bias.copy_(torch.tensor([0.0, -1.0, 1.0]))  # s, k, a, see CoordinateLSTM
    save_rule(rule, path, {})


def meta_train(
    data: Path,
    encoder: str,
    output: Path,
    *,
    resume: bool,
    sources: Sequence[str] = SOURCES,
    recipe: Sequence[str] = RECIPE.split(),
    hidden_size: int = 8,
) -> int:
    """Run it, the last of an option counts; the exit code."""
    start = Path(f"{output}.start.safetensors")
    gradient_descent(start, hidden_size)
    return main(
        [
            "meta-train",
            *("--data", *(str(data / source) for source in sources)),
            *("--encoder", encoder),
            *("--output", str(output), "--from", str(start)),
            *(["--resume"] if resume else []),
            *recipe,
            *("--hidden-size", str(hidden_size)),
        ]
    )


def ship(folder: Path) -> None:
    """Write both rules from the best one of a run."""
    rule, training = cast(CoordinateLSTM, load_rule(folder)), read_training(folder)
    training["settings"]["learned"]["origin"] = "gradient descent"  # rather than a path of this run
    save_rule(rule, folder / "shipped" / SHIPPED_HEAD_RULE.name, training)
    other = rule.growth_only(
        orthogonalize=True, growth_steps=LONGEST, growth_threshold=GROWTH_THRESHOLD
    )
    with torch.no_grad():
        other.growth_context.mul_(SLOWER)
        other.growth_bias.mul_(SLOWER)
    told = {**training, "growth_only": SLOWER}
    save_rule(other, folder / "shipped" / SHIPPED_RULE.name, told)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--data", "--encoder", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would end in other last bits
    output = Path(options.output)
    code = meta_train(Path(options.data), options.encoder, output, resume=options.resume)
    if code == 0:
        ship(output)
    sys.exit(code)

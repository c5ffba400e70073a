"""Make the rules that ship with rnnopt: for all kinds of training, and for a linear head alone.

    python scripts/meta_train.py rule --data DATA --encoder MINILM --output runs/shipped
    python scripts/meta_train.py head --data DATA --encoder MINILM --output runs/head

DATA is a folder that holds those of `SOURCES`, each a folder with train, val and test files of
disjoint classes: intents (CLINC150, Larson et al. 2019; Liu et al. 2019), headlines (HuffPost,
Misra 2018) and newswire (Reuters-21578), in the class splits of few-shot work (Dopierre et al.
2021, Bao et al. 2020). Only train is meta-trained on, val chooses the rule, test is never read into
a task. MINILM is all-MiniLM-L6-v2, a hub name or a folder. Everything else is fixed here. Add
--resume to go on after a stop: it ends with the same weights, bit for bit on one machine.

Time: an hour on one core of a busy server processor, 5 minutes for the head. Memory: 6 GiB.
The best rule's output is then shrunk by `SHRINK` towards the Adam that it steers, and written to
shipped.safetensors in the output folder, to be copied to rnnopt/weights/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from rnnopt.checkpoint import load_rule, read_training, save_rule
from rnnopt.cli import main

SOURCES = ("clinc150", "liu54", "huffpost36", "reuters31")
SHARED = """
--ways 2 3 4 5 8 10 15 --queries 3 --order 1 --steps 12 --shortest 3 --judged 0.5 --loss-scale 1.5
--clip 0.2 --hidden-size 8 --precision fp32 --device cpu --seed 0
"""
RECIPES = {
    "rule": """
--tune lora lora full head --exact lora head --lora-rank 8 8 2 --pooling model model mean
--top-layers all 3 2 2 --shots 1 1 2 5 --most-support 25 --batch-size 1000 1000 10 --calibrated 0.95
--meta-steps 220 --tasks 2 --meta-lr 5e-3 --max-length 28 --validate-every 44
--validation-tasks 12 --coordinates 30000
""",
    "head": """
--tune head --exact head --shots 1 1 2 5 10 --most-support 40 --calibrated 0.5 --meta-steps 120
--tasks 4 --meta-lr 6e-3 --max-length 32 --validate-every 40 --validation-tasks 16
""",
}

# Of what each rule puts out. Chosen from 0, 0.4, 0.7 and 1 on validation classes, in tasks that did
# not choose it: at full strength the one for all kinds gains at the first step and loses, with
# LoRA, at the third to the tenth; at 0.4 it keeps most of that gain and a lower loss, and is within
# three points of 0 (Adam at the model's own scale) at later steps.
SHRINK = {"rule": 0.4, "head": 1.0}


def shrink(folder: Path, factor: float) -> None:
    """Write the folder's best rule with its output shrunk."""
    rule = load_rule(folder)
    with torch.no_grad():
        for name, weight in rule.named_parameters():
            if name.startswith(("output_", "growth_")):
                weight.mul_(factor)
    training = {**read_training(folder), "output_shrunk_by": factor}
    save_rule(rule, folder / "shipped.safetensors", training)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rule", choices=tuple(RECIPES))
    for name in ("--data", "--encoder", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would end in other last bits
    code = main(
        [
            "meta-train",
            *("--data", *(str(Path(options.data) / source) for source in SOURCES)),
            *("--encoder", options.encoder),
            *("--output", options.output),
            *(["--resume"] if options.resume else []),
            *SHARED.split(),
            *RECIPES[options.rule].split(),
        ]
    )
    if code == 0:
        shrink(Path(options.output), SHRINK[options.rule])
    sys.exit(code)

"""Make the rule that ships with rnnopt.

    python scripts/meta_train.py --data DATA/clinc150 --encoder MINILM --output runs/shipped

DATA/clinc150 is a folder with train, val and test files of disjoint intent classes (CLINC150,
Larson et al. 2019, in the class split of Dopierre et al. 2021); only train is meta-trained on, val
chooses the rule, test is never read into a task. MINILM is all-MiniLM-L6-v2, a hub name or a
folder. Everything else is fixed here. Add --resume to go on after a stop: it ends with the same
weights, bit for bit on one machine.

Time: 45 to 70 minutes on one core of a server processor. Memory: 1 GiB.
Last line: the path of rule.safetensors, to be copied to rnnopt/weights/.
"""

from __future__ import annotations

import argparse
import sys

import torch

from rnnopt.cli import main

RECIPE = """
--ways 10 --shots 1 5 --queries 4 --tune lora --lora-rank 8 --pooling model
--order 1 --steps 8 --shortest 3 --meta-steps 600 --tasks 1 --meta-lr 5e-3 --hidden-size 8
--validate-every 25 --validation-tasks 6 --device cpu --seed 0
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--data", "--encoder", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in another order would end in other last bits
    sys.exit(
        main(
            [
                "meta-train",
                *("--data", options.data, "--encoder", options.encoder),
                *("--output", options.output),
                *(["--resume"] if options.resume else []),
                *RECIPE.split(),
            ]
        )
    )

"""The lowest versions that setup.cfg allows."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_lower_bound_of_setup_cfg_becomes_a_constraint():
    printed = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bounds.py")],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert {"torch==2.9", "transformers==5.9", "scikit-learn==1.6"} <= set(printed)
    assert len(printed) == (ROOT / "setup.cfg").read_text().count(">=") - 1  # Python's own

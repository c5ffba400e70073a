"""Parameters that are sharded over processes."""

import subprocess
import sys
from pathlib import Path

import torch

from rnnopt.optim.sharding import sum_over_shards

SCRIPT = Path(__file__).parents[1] / "sharded_steps.py"


def test_two_processes_with_shards_step_as_one_with_whole_tensors():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == 2


def test_ordinary_parameters_need_no_process_group():
    sums = [torch.rand(3), None]
    assert sum_over_shards(sums, [torch.zeros(2), torch.zeros(3)]) == sums

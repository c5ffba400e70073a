"""Parameters that are sharded over processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rule_table import RULES

from rnnopt.optim.sharding import sum_over_shards

SCRIPT = Path(__file__).parents[1] / "sharded_steps.py"

CHECKPOINTS = Path(__file__).parents[1] / "distributed_checkpoints.py"


def test_two_processes_with_shards_step_as_one_with_whole_tensors():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == 2


def torchrun(script, processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={processes}", str(script), *map(str, arguments)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow  # a minute, and torch does most of it
def test_two_processes_with_half_of_the_data_each_train_as_one_process_does():
    printed = torchrun(SCRIPT.with_name("data_parallel_steps.py"), 2)
    assert printed.count("same") == 2 * (len(RULES) + 2)


@pytest.mark.slow
@pytest.mark.parametrize("cases", ["fast", "all"])
def test_fsdp1_trains_as_one_process_and_resumes_from_torchs_state_dicts(cases):
    """With use_orig_params=True; flat parameters are refused."""
    assert torchrun(SCRIPT.with_name("flat_sharded_steps.py"), 2, cases).count("the end") == 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Saved by two processes in the middle of a run, sharded and whole."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torchrun(CHECKPOINTS, 2, "save", folder)
    return folder


# with other shards sums have another order
@pytest.mark.parametrize(
    ("processes", "atol"), [(2, 0.0), (1, 1e-6), pytest.param(3, 1e-6, marks=pytest.mark.slow)]
)
def test_a_distributed_checkpoint_resumes_exactly_with_any_number_of_processes(
    checkpoints, processes, atol
):
    lines = torchrun(CHECKPOINTS, processes, "resume", checkpoints).splitlines()
    distances = [float(line.split()[-1]) for line in lines if line.startswith("distance")]
    assert len(distances) == 2 * 3 * 6  # sharded and whole, cases, parameters
    assert max(distances) <= atol


def test_ordinary_parameters_need_no_process_group():
    sums = [torch.rand(3), None]
    assert sum_over_shards(sums, [torch.zeros(2), torch.zeros(3)]) == sums

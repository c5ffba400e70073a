"""Several processes: the same rule as one, one voice for mistakes, and no waiting for the dead.

Every process here is a real one, and they talk over real sockets.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from rnnopt.cli import main

META_STEPS = 20
# Runs commands one after another, each at a rendezvous of its own.
MEMBER = """
import json, os, sys
from rnnopt.cli import main
for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    code = main(arguments)
    print("exit code", code, flush=True)
    print("end of one", file=sys.stderr, flush=True)
"""


def meta_train(csv_file, encoder, folder, *more):
    """3 tasks to a meta-step and 3 to a validation, which 2 processes can't share evenly."""
    options = [
        "meta-train", "--data", csv_file, "--encoder", encoder, "--ways", "2", "--shots", "2",
        "--queries", "3", "--steps", "3", "--shortest", "1", "--tune", "full", "--pooling", "mean", "--tasks", "3",
        "--meta-steps", META_STEPS, "--validate-every", "5", "--validation-tasks", "3",
        "--checkpoint-every", "2", "--device", "cpu", "--output", folder, *more,
    ]  # fmt: skip
    return [str(option) for option in options]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start():
    """Start one of two processes, told by hand what torchrun would tell it."""
    members = []

    def start_member(rank, commands):
        variables = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        member = subprocess.Popen(
            [sys.executable, "-c", MEMBER, json.dumps(commands)],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        members.append(member)
        return member

    yield start_member
    for member in members:
        with member:  # closes its pipes
            member.kill()


def checkpoint(folder):
    return load_file(folder / "checkpoint.safetensors")


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def furthest(one, other):
    """The largest difference between two checkpoints' weights and states."""
    a, b = checkpoint(one), checkpoint(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def whole(csv_file, encoder, tmp_path_factory):
    """The folder of a run of one process that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(meta_train(csv_file, encoder, folder)) == 0
    return folder


def test_two_processes_learn_the_rule_of_one(whole, csv_file, encoder, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "-m", "rnnopt"]
    command = launcher + meta_train(csv_file, encoder, tmp_path / "run")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.count("best rule") == 1
    assert furthest(whole, tmp_path / "run") < 1e-6
    log, expected = records(tmp_path / "run"), records(whole)
    assert [line["meta_step"] for line in log] == list(range(META_STEPS + 1))
    for ours, theirs in zip(log, expected, strict=True):
        for name in ("query_losses", "meta_loss"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=2e-5)
        if "validation" in theirs:
            assert ours["validation"]["accuracy"] == theirs["validation"]["accuracy"]
            assert ours["validation"]["loss"] == pytest.approx(
                theirs["validation"]["loss"], abs=2e-5
            )
    assert (tmp_path / "run" / "learning.png").exists()


def test_a_killed_process_stops_the_run_and_one_alone_goes_on(
    whole, csv_file, encoder, start, tmp_path
):
    folder, port = tmp_path / "run", free_port()
    command = meta_train(csv_file, encoder, folder)
    survivor, victim = (start(rank, [(port, command)]) for rank in (0, 1))
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.safetensors").exists():
        assert survivor.poll() is victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    out, errors = survivor.communicate(timeout=60)
    assert victim.wait() == -signal.SIGKILL
    assert "exit code 2" in out
    assert "rnnopt meta-train: error: a process of this run was lost, or is out of reach" in errors
    assert "go on with --resume" in errors
    assert "Traceback" not in errors
    assert records(folder)[-1]["meta_step"] < META_STEPS
    print(records(folder)[-1], records(whole)[-1], errors)
    assert main([*command, "--resume"]) == 0
    assert furthest(whole, folder) < 1e-6


def test_mistakes_stop_every_process_and_rank_0_says_why(csv_file, encoder, start, tmp_path):
    taken, own = tmp_path / "taken", tmp_path / "own.csv"
    taken.mkdir()
    (taken / "thesis.txt").write_text("")
    own.write_text(csv_file.read_text() + "one line more,music\n")
    missing = tmp_path / "missing.csv"
    run = tmp_path / "run"
    mistakes = [
        ((csv_file, csv_file, taken), [], "is not an empty folder; choose another --output"),
        ((csv_file, csv_file, run), ["--tasks", "1"], "--tasks 1: must be at least 2, the number"),
        ((csv_file, csv_file, run), ["--tasks", "0"], "tasks_per_meta_step=0 (--tasks): must be"),
        ((csv_file, own, run), [], "the processes of this run differ (train: "),
        ((csv_file, missing, run), [], "process 1: "),
    ]
    ports = [free_port() for _ in mistakes]
    members = [
        start(
            rank,
            [
                (port, meta_train(data[rank], encoder, data[2], *more))
                for port, (data, more, _) in zip(ports, mistakes)
            ]
            + [(0, ["demo", "--output", str(run)])],
        )
        for rank in (0, 1)
    ]
    (out, told), (other_out, untold) = (member.communicate(timeout=120) for member in members)
    assert out.count("exit code 2") == other_out.count("exit code 2") == 6
    messages = [*(message for _, _, message in mistakes), "WORLD_SIZE=2: only meta-train runs in"]
    for part, message in zip(told.split("end of one"), messages):
        assert [line for line in part.splitlines() if "error: " in line and message in line]
        assert part.count("error: ") == 1
    assert "error" not in untold
    assert not run.exists()

"""Several processes: the same rule as one, one voice for mistakes, and no waiting for the dead.

Every process here is a real one, and they talk over real sockets.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from rnnopt import InputError
from rnnopt.cli.main import main
from rnnopt.cli.settings.loading import own_device
from rnnopt.meta.processes import Team

META_STEPS = 20
# Runs commands one after another, each at a rendezvous of its own.
MEMBER = """
import json, os, sys
from rnnopt.cli.main import main
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
        "--queries", "3", "--steps", "2", "--shortest", "1", "--tune", "lora", "--lora-rank",
        "2", "--pooling", "mean", "--tasks", "3",
        "--meta-steps", META_STEPS, "--validate-every", "5", "--validation-tasks", "3",
        "--checkpoint-every", "2", "--device", "cpu", "--output", folder, *more,
    ]  # fmt: skip
    return [str(option) for option in options]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(rank, commands):
    """One of two processes, told by hand what torchrun would tell it."""
    variables = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-c", MEMBER, json.dumps(commands)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(member):
    """The exit codes of a process's commands, and what each printed to stderr."""
    try:
        out, errors = member.communicate(timeout=120)
    finally:
        member.kill()
    codes = [int(line.split()[-1]) for line in out.splitlines() if line.startswith("exit code")]
    return codes, errors.split("end of one\n")[:-1]


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
        assert ours.get("query_losses") == pytest.approx(theirs.get("query_losses"), abs=2e-5)
        for name in {"meta_loss", "gradient_norm"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        if "validation" in theirs:
            assert ours["validation"]["accuracy"] == theirs["validation"]["accuracy"]
            assert ours["validation"]["loss"] == pytest.approx(
                theirs["validation"]["loss"], abs=2e-5
            )
    assert (tmp_path / "run" / "learning.png").exists()


@pytest.fixture(scope="module")
def cut(csv_file, encoder, tmp_path_factory):
    """The folder of a run of two processes, rank 1 of which was killed; and rank 0's results."""
    folder, port = tmp_path_factory.mktemp("cut") / "run", free_port()
    survivor, victim = (
        start(rank, [(port, meta_train(csv_file, encoder, folder))]) for rank in (0, 1)
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.safetensors").exists():
        assert survivor.poll() is victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    codes, errors = results(survivor)
    seconds = time.monotonic() - killed
    results(victim)
    assert victim.returncode == -signal.SIGKILL
    assert 2 <= records(folder)[-1]["meta_step"] < META_STEPS
    return folder, codes, errors, seconds


def test_a_killed_process_stops_the_others_with_a_clear_message(cut):
    _, codes, errors, seconds = cut
    assert codes == [2]
    assert seconds < 60
    message = errors[0].splitlines()[-1]
    assert message.startswith("rnnopt meta-train: error: a process of this run was lost, or is out")
    assert message.endswith("; go on with --resume")
    assert "Traceback" not in errors[0]


def test_one_process_goes_on_where_two_stopped(whole, cut, csv_file, encoder, tmp_path):
    shutil.copytree(cut[0], tmp_path / "run")
    assert main(meta_train(csv_file, encoder, tmp_path / "run", "--resume")) == 0
    assert furthest(whole, tmp_path / "run") < 1e-6


def mistakes(csv_file, folder):
    """Name: data of rank 0, data of rank 1, more options, output, what is said."""
    other = folder / "other.csv"
    other.write_text(csv_file.read_text() + "one line more,music\n")
    taken = folder / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("")
    new = folder / "new"
    return [
        (csv_file, csv_file, [], taken, "taken is not an empty folder; choose another --output"),
        (csv_file, csv_file, ["--tasks", "1"], new, "--tasks 1: must be at least 2, the number of"),
        (csv_file, csv_file, ["--tasks", "0"], new, "tasks_per_meta_step=0 (--tasks): must be at"),
        (csv_file, other, [], new, "the processes of this run differ (train: "),
        (csv_file, folder / "none.csv", [], new, "process 1: "),
    ]


def test_two_processes_go_on_and_mistakes_are_told_once(whole, cut, csv_file, encoder, tmp_path):
    """One behaviour each, but the same two processes, which take long to start."""
    shutil.copytree(cut[0], tmp_path / "run")
    cases = mistakes(csv_file, tmp_path)
    ports = [free_port() for _ in range(len(cases) + 1)]
    members = []
    for rank in (0, 1):
        # only rank 0 has the folder
        output = tmp_path / ("run" if rank == 0 else "elsewhere")
        commands = [meta_train(csv_file, encoder, output, "--resume")]
        commands += [meta_train(case[rank], encoder, case[3], *case[2]) for case in cases]
        commands = [*zip(ports, commands), (0, ["demo", "--output", str(tmp_path / "new")])]
        members.append(start(rank, commands))
    (codes, told), (other_codes, untold) = map(results, members)
    assert codes == other_codes == [0, 2, 2, 2, 2, 2, 2]
    assert furthest(whole, tmp_path / "run") < 1e-6
    messages = [*(case[4] for case in cases), "WORLD_SIZE=2: only meta-train runs in several"]
    for errors, message in zip(told[1:], messages, strict=True):
        (line,) = [line for line in errors.splitlines() if "error: " in line]
        assert message in line
    assert not any("error" in errors for errors in untold)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_a_process_without_a_gpu_of_its_own_is_refused():
    count = torch.cuda.device_count()
    with pytest.raises(InputError, match=f"LOCAL_RANK={count}: this machine has {count} GPUs, one"):
        own_device(count)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("two", "WORLD_SIZE='two': must be a whole number"),
        ("2", "can't join the 2 processes of this run .*; start them all with torchrun"),
    ],
)
def test_a_broken_environment_is_refused(monkeypatch, size, message):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match=message):
        Team.join()


def test_a_team_of_one_needs_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Team.join() as team:
        assert not torch.distributed.is_initialized()
        assert list(team.share(3)) == [0, 1, 2]
        assert team.gather("mine") == ["mine"]
        assert team.first(lambda: 1) == team.together(lambda: 1) == 1
        assert team.sum(torch.ones(2)).tolist() == [1, 1]


def test_two_processes_stop_together_where_a_requirement_is_met(csv_file, encoder, tmp_path):
    ports = [free_port() for _ in range(3)]
    members = []
    for rank in (0, 1):
        folder = tmp_path / ("run" if rank == 0 else "elsewhere")
        met = meta_train(csv_file, encoder, folder, "--until", "loss<1000")
        more = ["--resume", "--meta-steps", "2", "--until", "accuracy>=1"]
        commands = [met, [*met, "--resume"], meta_train(csv_file, encoder, folder, *more)]
        members.append(start(rank, list(zip(ports, commands))))
    (codes, _), (other_codes, _) = map(results, members)
    # only the first says that it was not met: torchrun would end it where another one fails
    assert (codes, other_codes) == ([0, 0, 3], [0, 0, 0])
    assert [line["meta_step"] for line in records(tmp_path / "run")] == [0, 1, 2]
    assert not (tmp_path / "elsewhere").exists()

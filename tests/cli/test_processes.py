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

META_STEPS = 12
INIT = "--tasks 3 --inner meta-sgd --head prototype --shortest 1"
ALONE = "WORLD_SIZE=2: only meta-train runs in several"
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


def init_command(csv_file, encoder, folder, more=""):
    """Initial values are learned too."""
    return (
        f"meta-train --data {csv_file} --encoder {encoder} --lora-rank 2 --ways 2 --shots 2 "
        f"--queries 3 --steps 2 --meta-steps 4 --validate-every 2 --validation-tasks 2 "
        f"--device cpu --init maml --init-lr 1e-3 --output {folder} {more}"
    )


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
        out, errors = member.communicate(timeout=600)
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


@pytest.mark.slow  # 20 s; the initial values are compared below
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
    deadline = time.monotonic() + 300
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


@pytest.fixture(scope="module")
def both(cut, csv_file, encoder, tmp_path_factory):
    """What two processes did with one command after another; they take long to start.

    Returns:
        The folder of it all; for ranks 0 and 1 the exit codes and what was printed to stderr, by
        the name of the command; and what each mistake is told as.
    """
    folder = tmp_path_factory.mktemp("both")
    shutil.copytree(cut[0], folder / "run")
    cases = mistakes(csv_file, folder)
    found = []
    for rank in (0, 1):
        # only rank 0 has the folders
        here = folder if rank == 0 else folder / "elsewhere"
        met = meta_train(csv_file, encoder, here / "until", "--until", "loss<1000")
        more = ["--resume", "--meta-steps", "2", "--until", "accuracy>=1"]
        init = init_command(csv_file, encoder, here / "init", INIT).split()
        found.append(
            {
                "go on": meta_train(csv_file, encoder, here / "run", "--resume"),
                **{case[4]: meta_train(case[rank], encoder, case[3], *case[2]) for case in cases},
                "met": met,
                "still met": [*met, "--resume"],
                "not met": meta_train(csv_file, encoder, here / "until", *more),
                "init": init,
                "alone": ["demo", "--output", str(folder / "new")],
            }
        )
    ports = [free_port() for _ in found[0]]
    members = [start(rank, list(zip(ports, found[rank].values()))) for rank in (0, 1)]
    told = [dict(zip(found[0], zip(*results(member)), strict=True)) for member in members]
    return folder, *told, [case[4] for case in cases]


def test_two_processes_go_on(whole, both):
    folder, first, second, _ = both
    assert first["go on"][0] == second["go on"][0] == 0
    assert furthest(whole, folder / "run") < 1e-6


def test_mistakes_are_told_once(both):
    folder, first, second, messages = both
    said = {**{name: name for name in messages}, "alone": ALONE}
    for name, message in said.items():
        assert (first[name][0], second[name][0]) == (2, 2)
        (line,) = [line for line in first[name][1].splitlines() if "error: " in line]
        assert message in line
    assert not any("error" in errors for _, errors in second.values())
    assert not (folder / "new").exists()
    assert not (folder / "elsewhere").exists()


def test_two_processes_stop_together_where_a_requirement_is_met(both):
    folder, *members, _ = both
    codes = [[told[name][0] for name in ("met", "still met", "not met")] for told in members]
    # only the first says that it was not met: torchrun would end it where another one fails
    assert codes == [[0, 0, 3], [0, 0, 0]]
    assert [line["meta_step"] for line in records(folder / "until")] == [0, 1, 2]


def test_two_processes_learn_the_initial_values_of_one(both, csv_file, encoder, tmp_path):
    folder, first, second, _ = both
    assert first["init"][0] == second["init"][0] == 0
    assert main(init_command(csv_file, encoder, tmp_path / "one", INIT).split()) == 0
    assert any(name.startswith("init.") for name in checkpoint(tmp_path / "one"))
    # Adam divides by the root of small second moments
    assert furthest(tmp_path / "one", folder / "init") < 1e-5
    assert (folder / "init" / "init" / "init.json").exists()


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

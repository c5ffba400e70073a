"""Files and folders that other processes, disks and people meddle with."""

import os
import subprocess
import sys

import pytest
import torch

from rnnopt import InputError
from rnnopt.storage.files import (
    claim_folder,
    hold_folder,
    parse_json,
    read_tensors,
    save_tensors,
    write_atomically,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from rnnopt.storage.files import claim_folder, write_atomically
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
claim_folder(Path(sys.argv[1]))
write_atomically(Path(sys.argv[1]) / "run.json", b"{}")
"""
HOLD = """
import sys
from pathlib import Path
from rnnopt.storage.files import hold_folder
hold_folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders there")
def test_a_folder_belongs_to_one_process_until_that_ends_however_it_ends(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"another process writes to {tmp_path} now; wait"):
            hold_folder(tmp_path)
    finally:
        other.kill()
        other.communicate()
    hold_folder(tmp_path)
    hold_folder(tmp_path)  # this process has it
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_folder_is_still_free_after_a_process_was_killed_in_its_first_write(tmp_path):
    folder = tmp_path / "new"
    subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert len(os.listdir(folder)) == 1
    claim_folder(folder)
    assert os.listdir(folder) == []
    write_atomically(folder / "run.json", b"{}")
    (folder / ".tmp-abc").touch()
    with pytest.raises(InputError, match="is not an empty folder"):
        claim_folder(folder)
    assert sorted(os.listdir(folder)) == [".tmp-abc", "run.json"]


@pytest.mark.parametrize("place", [-1, -30])
def test_a_bit_that_a_disk_has_flipped_in_a_tensor_is_found(tmp_path, place):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(20.0)}, {"step": 3})
    tensors, about = read_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(20.0)) and about == {"step": 3}
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="its tensors are not those that were saved"):
        read_tensors(path)


def test_deep_nesting_is_an_ordinary_mistake():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)

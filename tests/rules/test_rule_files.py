"""Rule files: complete, and data only."""

import os
import pickle

import pytest
import torch
from rule_table import random_lstm
from safetensors.torch import save_file

from rnnopt import SGD, InputError, load_rule, save_rule
from rnnopt.rules.files import read_training, rule_fingerprint
from rnnopt.storage.files import write_atomically


def test_a_saved_rule_comes_back_the_same(tmp_path):
    rule = random_lstm(coordinate_units=5)
    save_rule(rule, tmp_path / "rule.safetensors", {"sources": ["a", "b"]})
    loaded = load_rule(tmp_path)
    assert loaded.config == rule.config
    assert all(map(torch.equal, rule.parameters(), loaded.parameters()))
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert read_training(tmp_path) == {"sources": ["a", "b"]}


def test_float64_rules_stay_float64(tmp_path):
    save_rule(random_lstm(torch.float64), tmp_path / "r")
    assert load_rule(tmp_path / "r").output.weight.dtype == torch.float64


def test_a_rule_of_a_users_own_class_can_not_be_saved(tmp_path):
    class Mine(SGD):
        pass

    with pytest.raises(InputError, match="type Mine can't be saved, only one of TwoLevelLSTM, "):
        save_rule(Mine(0.1), tmp_path / "r")
    assert not list(tmp_path.iterdir())


def test_a_rule_in_bfloat16_has_a_fingerprint_of_its_own():
    rule = random_lstm()
    half = random_lstm().bfloat16()
    assert len(rule_fingerprint(half)) == 12
    assert rule_fingerprint(half) != rule_fingerprint(rule)


def damaged(tmp_path, name):
    path = tmp_path / "rule.safetensors"
    save_rule(random_lstm(), path)
    data = path.read_bytes()
    if name == "truncated":
        path.write_bytes(data[:-100])
    elif name == "cut in the header":
        path.write_bytes(data[:40])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "pickle":
        path.write_bytes(pickle.dumps({"gates.weight": 1}))
    elif name == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    elif name == "other config":
        path.write_bytes(data.replace(b'coordinate_units\\": 4', b'coordinate_units\\": 5'))
    elif name == "unknown option":
        path.write_bytes(data.replace(b'coordinate_units\\"', b'coordinate_unitz\\"'))
    elif name == "not finite":
        rule = random_lstm()
        rule.output.bias.data[0] = float("nan")
        save_rule(rule, path)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated", "no complete safetensors file .* make it again"),
        ("cut in the header", "no complete safetensors file"),
        ("empty", "no complete safetensors file"),
        ("pickle", "no complete safetensors file"),
        ("foreign", "holds 'no rnnopt rule', expected 'rnnopt.TwoLevelLSTM.2'"),
        ("other config", "weights and config do not fit together"),
        ("unknown option", "weights and config do not fit together"),
        ("not finite", "weights that are not finite"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path, name, message):
    path = damaged(tmp_path, name)
    with pytest.raises(InputError, match=message) as caught:
        load_rule(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"can't read .*nowhere: No such file"):
        load_rule(tmp_path / "nowhere")


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # a full disk can't be had in a test
    with pytest.raises(InputError, match=r"can't write .*No space left on device; choose a folder"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write"):
        write_atomically(tmp_path / "file" / "below", b"")

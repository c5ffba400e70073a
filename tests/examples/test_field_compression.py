"""Bytes that are counted, matrices in 8 bits, and a run on a tiny encoder."""

import json

import compression
import field
import pytest
import torch
from torch import nn

from tests.encoders import tiny_bert


def test_matrices_have_255_levels_a_row_and_vectors_stay():
    layer = nn.Linear(400, 3)
    before = layer.weight.detach().clone()
    small = compression.in_8_bits(layer)
    assert layer.weight.equal(before) and small.bias.equal(layer.bias)
    for row, old in zip(small.weight.detach(), before):
        assert len(row.unique()) <= 255
        assert float((row - old).abs().max()) <= float(old.abs().max()) / 127 / 2 * 1.01
    assert compression.bytes_of(layer) == (4 * 1203, 1200 + 4 * 3 + 4 * 3)


def test_the_bytes_of_a_state_are_those_of_its_tensors():
    weight = nn.Parameter(torch.ones(5, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(5, 2)
    optimizer.step()
    assert compression.state_bytes(optimizer) == 2 * 4 * 10 + 4  # two moments and a step


def test_a_state_in_8_bits_has_few_values_a_block_and_keeps_them_within_7_percent():
    torch.manual_seed(0)
    values = torch.randn(3, 100) * 10 ** torch.linspace(-3, 0, 100)
    made = compression.rounded_to_8_bits(values)
    assert made.shape == values.shape
    assert float(((made - values) / values).abs().max()) < 0.07
    assert len((made.flatten()[:64] / made.flatten()[:64].abs().max()).unique()) <= 255
    assert compression.rounded_to_8_bits(made).allclose(made, rtol=1e-5)
    assert compression.rounded_to_8_bits(torch.zeros(70)).equal(torch.zeros(70))
    wide = torch.tensor([1.0, 1e-9, *[0.0] * 62])
    assert compression.rounded_to_8_bits(wide).tolist()[:2] == [1, 0]


def test_adamw_with_its_state_in_8_bits_reaches_what_adamw_reaches():
    aim = torch.linspace(-1, 1, 128)
    left = {}
    for build in (compression.adamw(0.05), compression.with_8_bit_state(compression.adamw(0.05))):
        weight = nn.Parameter(torch.zeros(128))
        optimizer = build([weight])
        for _ in range(60):
            optimizer.zero_grad()
            (weight - aim).square().sum().backward()
            optimizer.step()
        left[compression.state_bytes(optimizer, small=True)] = (weight - aim).abs().max().item()
        moment = optimizer.state[weight]["exp_avg"]
    assert max(left.values()) < 0.1
    assert list(left) == [2 * (128 + 4 * 2) + 4]  # two moments of two blocks, and a step
    assert moment.equal(compression.rounded_to_8_bits(moment))


def test_a_run_has_every_encoder_rank_and_method(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compression, "STEPS", 1)
    monkeypatch.setattr(compression, "find_spec", lambda name: None)
    monkeypatch.setattr(compression, "QUERY", 2)
    for stem in ("val", "test"):
        rows = [
            {"text": f"word{label} number{n}", "label": f"{stem}{label}"}
            for label in range(6)
            for n in range(7)
        ]
        (tmp_path / f"{stem}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = field.Options(
        tmp_path, tmp_path, meta_steps=0, episodes=2, small=True,
        more={"encoder": str(tiny_bert(tmp_path / "encoder")), "ranks": [1]},
    )  # fmt: skip
    compression.main(options)
    shown = capsys.readouterr().out
    assert shown.count("| every other layer | 1 |") == shown.count("| whole | 1 |") == 4
    rows = json.loads((tmp_path / "compression.json").read_text())["rows"]
    sizes = {row["encoder"]: row["model"] for row in rows}
    assert sizes["every other layer"] < sizes["whole"]
    state = {row["method"]: row["state"] for row in rows}
    assert 0 < state["shipped rule, 8-bit state"] < state["shipped rule"]
    assert (tmp_path / "compression.png").stat().st_size > 0


def test_an_encoder_whose_layers_are_elsewhere_is_named(tmp_path):
    from transformers import GPT2Config

    from rnnopt import InputError
    from tests.encoders import tiny_encoder

    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=500)
    folder = tiny_encoder(tmp_path / "gpt2", config)
    with pytest.raises(InputError, match=r"gpt2 model.*choose a BERT-like encoder"):
        compression.pruned(str(folder), tmp_path / "pruned")

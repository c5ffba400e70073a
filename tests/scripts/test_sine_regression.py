"""MAML on sine curves (Finn et al. 2017): the way to the published figures, and the figures."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnnopt import SGD

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Finn et al. 2017, arXiv:1703.03400, table 2: MAML's error at 5 points after so many steps.
PUBLISHED = {"1": 0.67, "10": 0.35}


@pytest.fixture
def sine(monkeypatch):
    """The script, as `python scripts/sine_regression.py` would import it."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("sine_regression")


def test_maml_pulls_ahead_of_a_net_that_was_pretrained_on_all_tasks(sine, monkeypatch):
    """A hundredth of the tasks, at a higher rate: on the way to the figures below."""
    monkeypatch.setattr(sine, "TUNING_TASKS", 10)
    net, plain = sine.sine_net(), sine.sine_net()
    size = {"iterations": 450, "tasks": 2}
    sine.maml(net, SGD(sine.INNER_LR), meta_lr=1e-2, **size)
    sine.pretrain(plain, **size)
    before, one, ten = sine.errors(net, SGD(sine.INNER_LR), range(30), seed=1).mean(axis=0)
    _, plain_one, plain_ten = sine.tuned_errors(plain, range(30), seed=1).mean(axis=0)
    assert ten < one < 0.85 * before
    assert one < 0.9 * plain_one
    assert ten < 0.85 * plain_ten


def test_a_curve_is_the_same_at_every_call_and_support_and_query_differ(sine):
    (x, y), (other, _) = sine.sine_task(0, 7, 5, 5)
    (again, _), _ = sine.sine_task(0, 7, 5, 5)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert x.abs().max() <= 5
    assert y.abs().max() <= 5


@pytest.mark.slow
def test_maml_reaches_the_published_figures(tmp_path):
    command = [sys.executable, str(SCRIPTS / "sine_regression.py"), "--json", str(tmp_path / "f")]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((tmp_path / "f").read_text())
    maml, pretrained = result["sgd, order 2"], result["pretrained, best step size"]
    for steps, figure in PUBLISHED.items():  # which has an error of its own, not given
        assert maml[steps]["mean"] - 2 * maml[steps]["ci95"] < figure
    assert maml["10"]["mean"] < maml["1"]["mean"] < 0.5 * pretrained["1"]["mean"]

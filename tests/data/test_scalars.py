"""`to_writer`: log records as curves of TensorBoard, or of anything with its `add_scalar`."""

import pytest
import torch

import rnnopt
from rnnopt import TextClassifier, to_writer
from rnnopt.errors import InputError
from rnnopt.rules.classical import AdamW


class Writer:
    """What `torch.utils.tensorboard.SummaryWriter` has, and nothing else."""

    def __init__(self):
        self.rows = []

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.rows.append((tag, scalar_value, global_step))


def test_numbers_are_written_at_their_step_and_the_rest_is_left_out():
    writer = Writer()
    to_writer(writer)({
        "meta_step": 3, "meta_loss": 0.5, "skipped": None, "name": "x", "met": True,
        "query_losses": [1.0, None, 0.25], "validation": {"loss": [2.0], "score": 1},
    })  # fmt: skip
    assert writer.rows == [
        ("meta_loss", 0.5, 3), ("query_losses/1", 1.0, 3), ("query_losses/3", 0.25, 3),
        ("validation/loss/1", 2.0, 3), ("validation/score", 1.0, 3),
    ]  # fmt: skip


def test_names_have_the_prefix():
    writer = Writer()
    to_writer(writer, "run 1/")({"step": 2, "loss": 1.0, "held_out": {"accuracy": 0.5}})
    assert writer.rows == [("run 1/loss", 1.0, 2), ("run 1/held_out/accuracy", 0.5, 2)]


def test_meta_training_draws_curves():
    learner = rnnopt.Learner(torch.nn.Linear(1, 1))

    def tasks(number):
        x = torch.linspace(-1, 1, 5).unsqueeze(1)

        def loss(net, step):
            return (net(x) - number % 3 * x).square().mean()

        return rnnopt.Task(loss, loss)

    writer = Writer()
    rnnopt.meta_train(
        learner, tasks, meta_steps=2, steps=2, validation_tasks=2, report=to_writer(writer)
    )
    drawn = {(tag, step) for tag, _, step in writer.rows}
    assert {("meta_loss", 1), ("meta_loss", 2), ("validation/score", 0)} <= drawn


def test_adaptation_draws_curves(encoder, texts):
    rows = [pair for pair in texts if pair[1] in ("food", "music")][::4]
    writer, records = Writer(), []
    classifier = TextClassifier(
        encoder, rule=AdamW(step_size=1e-2), steps=3, seconds=None, device="cpu"
    )
    both = to_writer(writer)

    def report(record):
        both(record)
        records.append(record)

    classifier.fit([text for text, _ in rows], [label for _, label in rows], report=report)
    drawn = {(tag, step) for tag, _, step in writer.rows}
    assert {("loss", step) for step in (1, 2, 3)} <= drawn
    assert {("held_out/log_loss", step) for step in (0, 2, 3)} <= drawn
    losses = [record for record in records if "loss" in record]
    assert {record["fold"] for record in losses} >= {1, 2, 3}
    first = [record["loss"] for record in losses if record["fold"] == 1]
    assert len(first) == 3 and all(loss > 0 for loss in first)


def test_tensorboard_itself_takes_them(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        to_writer(writer)({"step": 1, "loss": 0.5})
    assert list(tmp_path.glob("events.*"))


def test_what_is_no_writer():
    with pytest.raises(InputError, match="writer is a str, which has no method add_scalar; give"):
        to_writer("runs/mine")

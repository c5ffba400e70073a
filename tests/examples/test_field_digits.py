"""Strings of spoken words: how they are put together, CTC, and a run on tones."""

import math
import random
import zipfile

import pytest
import torch
from torch import nn

pytest.importorskip("jiwer")

import digits
import field

from tests.examples.test_field_speech import RATE, wav


@pytest.fixture
def recordings(tmp_path):
    """A zip file of four words of five speakers, a tone each, three times."""
    path = tmp_path / "recordings.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for speaker in range(5):
            for word in range(4):
                for take in range(3):
                    tone = 300 * (1 + word) + 20 * speaker + take
                    archive.writestr(f"{word}_s{speaker}_{take}.wav", wav(tone))
    return path


def said(*words, seconds=0.2):
    """Words, each with samples of its own."""
    return [(word, torch.full((int(seconds * RATE),), 0.1 * (at + 1))) for at, word in
            enumerate(words)]  # fmt: skip


class Sure(nn.Module):
    """Says the same tokens whatever it hears, one a frame."""

    def __init__(self, rows, frames):
        super().__init__()
        rows = [row + [0] * (frames - len(row)) for row in rows]
        self.logits = 20 * nn.functional.one_hot(torch.tensor(rows).T, 5).float()

    def forward(self, mel):
        return self.logits.log_softmax(dim=-1)


def test_strings_hold_every_recording_once_and_are_not_short():
    for seed in range(20):
        strings = digits.cut(said(*range(10)), random.Random(seed))
        assert sorted(word for string in strings for word, _ in string) == list(range(10))
        assert all(len(string) >= digits.SHORTEST for string in strings)


def test_blanks_and_repeats_are_read_as_ctc_reads_them():
    strings = digits.Strings([said(0, 0, 3), said(1, 2, 3)], random.Random(0), RATE)
    frames = int(strings.frames.max())
    right = Sure([[1, 1, 0, 1, 4], [2, 0, 3, 3, 4]], frames)
    assert strings.word_error_rate(right) == 0
    assert float(strings.loss(right)) < 1e-3
    # a repeat without a blank between is one word: one of six is left out
    assert strings.word_error_rate(Sure([[1, 1, 1, 4], [2, 3, 4]], frames)) == pytest.approx(1 / 6)
    assert strings.word_error_rate(Sure([[], []], frames)) == 1


def test_the_loss_is_the_mean_over_strings_of_nats_a_word_and_gradients_reach_every_weight():
    net = digits.Reader(4)
    strings = digits.Strings([said(0, 1, 2), said(3, 2, 1, 0)], random.Random(0), RATE)
    assert net(strings.mel).shape == (math.ceil(strings.mel.shape[2] / 2), 2, 5)
    loss = strings.loss(net)
    loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in net.parameters())
    alone = [
        digits.Strings([one], random.Random(0), RATE).loss(net).item()
        for one in (said(0, 1, 2), said(3, 2, 1, 0))
    ]
    assert loss.item() == pytest.approx(sum(alone) / 2, rel=0.05)


@pytest.fixture
def few(monkeypatch):
    """Recordings of a task, as few as those of the fixture `recordings`."""
    monkeypatch.setattr(digits, "TRAIN_SHOTS", (1,))
    monkeypatch.setattr(digits, "QUERY", 2)


def options(recordings, tmp_path):
    more = {"rate": RATE, "test_speakers": 1, "shots": [1]}
    return field.Options(recordings, tmp_path, 1, 2, small=True, more=more)


def test_tasks_are_of_speakers_whom_their_network_has_not_heard(tmp_path, recordings, few):
    heard = []
    made = digits.pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            digits, "pretrained", lambda found, speakers, *rest: (
                heard.append(list(speakers)) or made(found, speakers, *rest)
            )
        )  # fmt: skip
        found = digits.make_field(options(recordings, tmp_path))
    assert heard == [["s3", "s4"], ["s2", "s4"], ["s2", "s3"], ["s2", "s3", "s4"]]
    values = found.learner.initial_values
    for part, own in (("train", True), ("validation", False), ("test", False)):
        task = found.task(part, 3, True)
        assert bool(task.start) == own
        assert len(task.seen.labels) == 4 and len(task.asked.labels) == 8
        found.learner.begin(task, 0)
        assert values["head.weight"].equal(found.learner.module.head.weight) != own
        scores = task.scores(found.learner.module)
        assert scores["WER"] >= 0 and scores["loss"] > 0
        again = found.task(part, 3, True)
        assert again.seen.mel.equal(task.seen.mel) and again.asked.words == task.asked.words


@pytest.mark.slow
def test_a_run_reports_the_word_error_rate(tmp_path, recordings, few, capsys):
    digits.main(options(recordings, tmp_path))
    assert "WER after" in capsys.readouterr().out


def test_a_recording_in_stereo_ends_the_command_with_2(tmp_path, exit_code, capsys):
    (tmp_path / "seven_anna_0.wav").write_bytes(wav(channels=2))
    assert exit_code(digits, "--data", tmp_path, "--output", tmp_path / "out") == 2
    assert "2 channels" in capsys.readouterr().err

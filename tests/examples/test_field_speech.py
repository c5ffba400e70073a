"""Spoken words: features, what a recording must be, and a run on tones."""

import io
import math
import random
import wave
import zipfile

import field
import numpy as np
import pytest
import speech
import torch

import rnnopt

RATE = 8000


def wav(tone=440.0, seconds=0.2, rate=RATE, channels=1, loudness=0.5):
    """The content of a WAV file with a tone, in Hz."""
    time = np.arange(int(seconds * rate) * channels) / rate
    samples = (32767 * loudness * np.sin(2 * math.pi * tone * time)).astype("<i2")
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return content.getvalue()


@pytest.fixture
def recordings(tmp_path):
    """A zip file of three words of five speakers, a tone each, three times."""
    path = tmp_path / "recordings.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for speaker in range(5):
            for word in range(3):
                for take in range(3):
                    tone = 300 * (1 + word) + 20 * speaker + take
                    archive.writestr(f"folder/{word}_s{speaker}_{take}.wav", wav(tone))
    return path


def options(data, output, **more):
    more = {"rate": RATE, "test_speakers": 1, "unheard": ["speaker"], "shots": [1], **more}
    return field.Options(data, output, meta_steps=1, episodes=2, small=True, more=more)


def test_the_loudest_band_is_that_of_the_tone_and_loudness_does_not_matter():
    found = [
        speech.log_mel(speech.samples("x.wav", wav(tone, 1, loudness=loud), RATE), RATE)
        for tone, loud in ((500, 0.5), (500, 0.1), (2000, 0.5))
    ]
    low, quiet, high = (mel.mean(dim=1).argmax() for mel in found)
    assert low == quiet < high
    assert found[0].shape == (speech.MELS, speech.FRAMES)
    centres = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + 4000 / 700), 42) / 2595) - 1)
    assert abs(float(centres[1:-1][low]) - 500) < 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wav(rate=16000), "16000 samples a second.*must have 8000.*--rate"),
        (wav(channels=2), "2 channels.*convert it"),
        (wav(seconds=0), "no sample.*record it again"),
        (b"RIFF", "convert it to a 16-bit PCM"),
    ],
)
def test_a_recording_that_can_not_be_used_is_named(content, message):
    with pytest.raises(rnnopt.InputError, match=f"(?s)seven_anna_0.wav.*{message}"):
        speech.samples("seven_anna_0.wav", content, RATE)


def test_names_and_numbers_of_recordings_are_checked(tmp_path, recordings):
    (tmp_path / "seven.wav").write_bytes(wav())
    with pytest.raises(rnnopt.InputError, match="must be named WORD_SPEAKER_NUMBER"):
        speech.read_recordings(tmp_path, RATE)
    with pytest.raises(rnnopt.InputError, match="an episode needs 15 recordings"):
        speech.main(options(recordings, tmp_path))
    with pytest.raises(rnnopt.InputError, match=r"5 speakers.*--test-speakers 3.*record more"):
        speech.main(options(recordings, tmp_path, test_speakers=3))


def test_a_run_is_on_speakers_who_were_not_heard(tmp_path, recordings, monkeypatch):
    monkeypatch.setattr(speech, "TRAIN_SHOTS", (1,))
    monkeypatch.setattr(speech, "QUERY", 2)
    seen = []
    made = speech.Episode.__init__

    def noted(self, recordings, speaker, *rest):
        seen.append((speaker, rest[-2], bool(rest[-1])))
        made(self, recordings, speaker, *rest)

    monkeypatch.setattr(speech.Episode, "__init__", noted)
    speech.main(options(recordings, tmp_path))
    assert (tmp_path / "speech-speaker-1-shot.md").exists()
    assert {speaker for speaker, scored, _ in seen if scored} == {"s0", "s1"}
    # in meta-training, a speaker starts from a network that has not heard him
    assert {speaker for speaker, _, own in seen if own} <= {"s2", "s3", "s4"}
    assert all(own for speaker, scored, own in seen if not scored and speaker != "s1")


def test_support_and_query_share_no_recording_and_a_number_is_one_task(recordings):
    found = speech.read_recordings(recordings, RATE)
    shapes = [torch.zeros(1)]

    class Spy(torch.nn.Module):
        def forward(self, mel):
            shapes.append(mel)
            return torch.zeros(len(mel), 2, requires_grad=True)

    for _ in range(2):
        drawn = random.Random(3)
        speech.QUERY, kept = 2, speech.QUERY
        task = speech.Episode(found, "s0", ["0", "1"], 1, drawn, True, {})
        task.support_loss(Spy(), 0)
        task.scores(Spy())
        speech.QUERY = kept
    first, second = shapes[1:4], shapes[4:]
    assert all(a.equal(b) for a, b in zip(first, second))
    support, query = first[0], first[1]
    assert not any(row.equal(other) for row in support for other in query)


def test_a_recording_in_stereo_ends_the_command_with_2(tmp_path, exit_code, capsys):
    (tmp_path / "seven_anna_0.wav").write_bytes(wav(channels=2))
    assert exit_code(speech, "--data", tmp_path, "--output", tmp_path / "out") == 2
    assert "2 channels" in capsys.readouterr().err

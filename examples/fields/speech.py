"""Spoken words of a speaker who has not been heard, or words that have not been heard.

    python examples/fields/speech.py --data DATA/spoken_digits/recordings.zip

The recordings are a folder or a zip file of mono 16-bit WAV files of one sampling rate, named
WORD_SPEAKER_NUMBER.wav. Two speakers are for the report, one is for choosing learning rates, and
the others are for pretraining and meta-training. A small convolutional network on log-mel features
is pretrained on those others. With --unheard words the last three words are left out of all
training, and an episode is to tell them apart.

In meta-training a speaker must be new as well. Each training speaker therefore has a network of his
own that was pretrained on the others.
"""

from __future__ import annotations

import io
import math
import wave
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnnopt

MELS, WINDOW, HOP = 40, 0.032, 0.016  # bands; seconds
FRAMES = 40  # the first 0.64 s of a recording
Recordings = dict[tuple[str, str], Tensor]  # (speaker, word) -> (recordings, MELS, FRAMES)


def wav_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the WAV files of a folder or a zip file."""
    try:
        if path.is_dir():
            yield from ((file.name, file.read_bytes()) for file in sorted(path.rglob("*.wav")))
            return
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".wav"):
                    yield Path(name).name, archive.read(name)
    except (OSError, zipfile.BadZipFile) as error:
        raise rnnopt.InputError(
            f"{path}: {error}; name a folder or a zip file of WAV files"
        ) from error


def samples(name: str, content: bytes, rate: int) -> Tensor:
    """The samples of a mono 16-bit WAV file, between -1 and 1."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            found = file.getframerate(), file.getnchannels(), file.getsampwidth()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise rnnopt.InputError(f"{name}: {error}; convert it to a 16-bit PCM WAV file") from error
    if found != (rate, 1, 2):
        raise rnnopt.InputError(
            f"{name} has {found[0]} samples a second, {found[1]} channels and {8 * found[2]} bits: "
            f"it must have {rate}, 1 and 16; convert it (sox {name} -r {rate} -c 1 -b 16 ...) or "
            "pass --rate"
        )
    if not raw:
        raise rnnopt.InputError(f"{name} holds no sample: it must not be empty; record it again")
    return torch.from_numpy(np.frombuffer(raw, "<i2").astype(np.float32) / 32768)


def mel_filters(rate: int, bins: int) -> Tensor:
    """Triangular filters whose centres are equally spaced in mel, (MELS, bins)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, MELS + 2) / 2595) - 1)  # Hz
    at = torch.linspace(0, rate / 2, bins)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((at - low) / (centre - low), (high - at) / (high - centre)).clamp_min(0)


def log_mel(sound: Tensor, rate: int) -> Tensor:
    """Log-mel features, (MELS, FRAMES), with mean 0 and variance 1 over a recording."""
    window, hop = round(WINDOW * rate), round(HOP * rate)
    sound = nn.functional.pad(sound, (0, max(0, hop * FRAMES - len(sound))))[: hop * FRAMES]
    power = torch.stft(
        sound, window, hop, window=torch.hann_window(window), pad_mode="constant",
        return_complex=True,
    ).abs().square()[:, :FRAMES]  # fmt: skip
    mel = (mel_filters(rate, len(power)) @ power + 1e-6).log()
    return (mel - mel.mean()) / mel.std().clamp_min(1e-3)


def read_recordings(path: Path, rate: int) -> Recordings:
    """All recordings of a folder or zip file as features."""
    found: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for name, content in wav_files(path):
        parts = name.removesuffix(".wav").split("_")
        if len(parts) != 3:
            raise rnnopt.InputError(
                f"{name}: a file must be named WORD_SPEAKER_NUMBER.wav, such as "
                "seven_anna_0.wav; rename it"
            )
        found[parts[1], parts[0]].append(log_mel(samples(name, content, rate), rate))
    return {key: torch.stack(list_) for key, list_ in found.items()}


class KeywordNet(nn.Module):
    """Three convolutions over time, the mean over time, and a linear head."""

    def __init__(self, words: int, width: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(MELS, width, 5, 2, 2), nn.ReLU(), nn.GroupNorm(1, width),
            nn.Conv1d(width, width, 5, 2, 2), nn.ReLU(), nn.GroupNorm(1, width),
            nn.Conv1d(width, width, 3, 1, 1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, words)

    def forward(self, mel: Tensor) -> Tensor:
        """Logits (B, words) of features (B, MELS, FRAMES)."""
        hidden = self.body(mel)
        return self.head(torch.cat([hidden.mean(dim=2), hidden.amax(dim=2)], dim=1))

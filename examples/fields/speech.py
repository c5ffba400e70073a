"""Spoken words of a speaker who has not been heard, or words that have not been heard.

    python examples/fields/speech.py --data spoken_digits/recordings.zip --output out

The recordings are a folder or a zip file of mono 16-bit WAV files of one sampling rate, named
WORD_SPEAKER_NUMBER.wav. In the order of their names, two speakers are for the report, one is for
choosing learning rates, and the others are for training. A small convolutional network on log-mel
features is pretrained on the training speakers. In meta-training a speaker must be new to the
network, too: each training speaker has one that was pretrained on the others.

The second comparison is of words: the last three are for the report, three are for choosing
learning rates, and the network is pretrained and rules are meta-trained on the others.
"""

from __future__ import annotations

import functools
import io
import math
import random
import sys
import wave
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from field import Field, Options, at_default, command, kept, main_of, unadapted
from language import pretrain
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnnopt

MELS, WINDOW, HOP = 40, 0.032, 0.016  # bands; seconds
FRAMES = 40  # the first 0.64 s of a recording
TRAIN_SHOTS = (1, 5)  # recordings of each word to adapt to, in meta-training
QUERY = 10  # and to be judged by
WAYS = 3  # words of an episode with --unheard words
MORE = {
    "rate": {"default": 8000, "type": int, "help": "samples a second [%(default)s]"},
    "shots": {
        "default": [1, 5], "nargs": "+", "type": int,
        "help": "recordings of each word to adapt to, in the report [1 5]",
    },
    "test_speakers": {"default": 2, "type": int, "help": "speakers of the report [%(default)s]"},
    "unheard": {
        "default": ["speaker", "words"], "nargs": "+", "choices": ["speaker", "words"],
        "help": "what an episode has that was not heard, one or both [both]",
    },
}  # fmt: skip
Recordings = dict[tuple[str, str], list[Tensor]]  # (speaker, word) -> (MELS, FRAMES) each


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


def log_mel(sound: Tensor, rate: int, frames: int = FRAMES) -> Tensor:
    """Log-mel features, (MELS, frames), with mean 0 and variance 1 over a recording."""
    window, hop = round(WINDOW * rate), round(HOP * rate)
    sound = nn.functional.pad(sound, (0, max(0, hop * frames - len(sound))))[: hop * frames]
    power = torch.stft(
        sound, window, hop, window=torch.hann_window(window), pad_mode="constant",
        return_complex=True,
    ).abs().square()[:, :frames]  # fmt: skip
    mel = (mel_filters(rate, len(power)) @ power + 1e-6).log()
    return (mel - mel.mean()) / mel.std().clamp_min(1e-3)


def read_recordings(
    path: Path, rate: int, made: Callable[[Tensor, int], Tensor] = log_mel
) -> Recordings:
    """All recordings of a folder or zip file, as features that `made` makes of the samples."""
    found: Recordings = defaultdict(list)
    for name, content in wav_files(path):
        parts = name.removesuffix(".wav").split("_")
        if len(parts) != 3:
            raise rnnopt.InputError(
                f"{name}: a file must be named WORD_SPEAKER_NUMBER.wav, such as "
                "seven_anna_0.wav; rename it"
            )
        found[parts[1], parts[0]].append(made(samples(name, content, rate), rate))
    if not found:
        raise rnnopt.InputError(f"{path} holds no .wav file; name a folder or zip file that does")
    return found


class KeywordNet(nn.Module):
    """Three convolutions over time, the mean over time, and a linear head."""

    def __init__(self, words: int, width: int = 24) -> None:
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


class FromTask(rnnopt.Learner):
    """A network whose initial values are those that a task brings, if it brings any."""

    @torch.no_grad()
    def begin(self, task: rnnopt.Task, seed: int) -> None:
        """Put the network where the task starts."""
        super().begin(task, seed)
        for name, param in self.trainable():
            param.copy_(task.start.get(name, param))


class Episode(rnnopt.Task):
    """Some recordings of a speaker to adapt to, others to be judged by, and where to start."""

    def __init__(
        self, recordings: Recordings, speaker: str, words: Sequence[str], shots: int,
        drawn: random.Random, scored: bool, start: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.start = start
        rows = [drawn.sample(recordings[speaker, word], shots + QUERY) for word in words]
        seen, asked = (
            torch.stack([mel for row in rows for mel in row[part]])
            for part in (slice(shots), slice(shots, None))
        )
        (seen_as, asked_as) = (
            torch.arange(len(words)).repeat_interleave(n) for n in (shots, QUERY)
        )

        def metrics(net: nn.Module) -> dict[str, float]:
            return {"accuracy": float((net(asked).argmax(dim=1) == asked_as).float().mean())}

        super().__init__(
            lambda net, step: cross_entropy(net(seen), seen_as),
            lambda net, step: cross_entropy(net(asked), asked_as),
            metrics if scored else None,
            loss_unit=math.log(len(words)),
        )


def pretrained(
    recordings: Recordings, speakers: Sequence[str], words: Sequence[str], options: Options
) -> dict[str, Tensor]:
    """The values of a network that has learned to tell the words of some speakers apart."""
    torch.manual_seed(options.seed)
    net = KeywordNet(len(words))
    heard = [
        (mel, label)
        for speaker in speakers
        for label, word in enumerate(words)
        for mel in recordings[speaker, word]
    ]

    def loss(drawn: random.Random) -> Tensor:
        mels, labels = zip(*drawn.choices(heard, k=64))
        mel = torch.stack(mels).roll(drawn.randint(-4, 4), dims=2)  # begins earlier or later
        band = drawn.randint(0, MELS - 6)
        mel[:, band : band + 6] = 0  # SpecAugment, Park et al. 2019, arXiv:1904.08779
        return cross_entropy(net(mel), torch.tensor(labels), label_smoothing=0.05)

    steps = 3 if options.small else 400
    facts = {"speakers": speakers, "words": words, "steps": steps, "seed": options.seed}
    facts["recordings"] = [len(heard), float(sum(mel[:, 0].sum() for mel, _ in heard))]
    return kept(
        options.output, "speech-model", facts,
        lambda: pretrain(net, loss, steps, 4e-3, options.seed),
    )  # fmt: skip


def field_of(
    name: str, title: str, recordings: Recordings, parts: Mapping[str, list[str]],
    words: Mapping[str, list[str]], values: dict[str, Tensor],
    starts: Mapping[str, dict[str, Tensor]], options: Options,
) -> Field:  # fmt: skip
    """Episodes of the speakers and words of each part, from the network's values."""
    ways = len(words["test"])
    net = KeywordNet(ways)
    net.load_state_dict(values)

    def task(shots: int | None, part: str, number: int, scored: bool) -> rnnopt.Task:
        drawn = random.Random(f"{options.seed} {part} {number}")
        speaker, chosen = drawn.choice(parts[part]), drawn.sample(words[part], ways)
        if ways == len(words[part]):  # the network knows these words by their numbers
            chosen = words[part]
        start = starts.get(speaker, {})
        shots = shots or drawn.choice(TRAIN_SHOTS)
        return Episode(recordings, speaker, chosen, shots, drawn, scored, start)

    return Field(
        name,
        title,
        FromTask(net, head=["head.weight", "head.bias"]),
        functools.partial(task, None),
        metrics={"accuracy": rnnopt.Metric(higher_is_better=True)},
        usual={"Adam at 0.001": at_default(torch.optim.Adam)},
        settings={
            f"{shots}-shot": functools.partial(task, shots) for shots in options.more["shots"]
        },
        facts={"speakers": parts, "words": words, "rate": options.more["rate"]},
        direct={"none": unadapted},
        budgets=(1, 3, 10),
        meta_sgd=0.03,
    )


def divided(
    recordings: Recordings, test_speakers: int, needed: int
) -> tuple[dict[str, list[str]], list[str]]:
    """The speakers of each part, and the words, which every speaker has spoken often enough."""
    speakers = sorted({speaker for speaker, _ in recordings})
    words = sorted({word for _, word in recordings})
    if len(speakers) < test_speakers + 3 or test_speakers < 1:
        raise rnnopt.InputError(
            f"{len(speakers)} speakers, of which --test-speakers {test_speakers} are for the "
            "report: it needs at least 1 for that, 1 to choose by and 2 to train on; record more"
        )
    for speaker in speakers:
        for word in words:
            count = len(recordings.get((speaker, word), []))
            if count < needed:
                raise rnnopt.InputError(
                    f"{speaker} has spoken {word!r} {count} times: an episode needs "
                    f"{needed} recordings of every word; record more, or remove it"
                )
    names = speakers[:test_speakers], [speakers[test_speakers]], speakers[test_speakers + 1 :]
    return dict(zip(("test", "validation", "train"), names)), words


def make_field(options: Options, unheard: str = "speaker") -> Field:
    """Read the recordings, pretrain the networks, and say what a task is.

    Args:
        options: of the command.
        unheard: what an episode has that was not heard, "speaker" or "words".

    Raises:
        InputError: the recordings can't be used.
    """
    recordings = read_recordings(options.data, options.more["rate"])
    needed = max(*TRAIN_SHOTS, *options.more["shots"]) + QUERY
    parts, words = divided(recordings, options.more["test_speakers"], needed)
    train = parts["train"]
    if unheard == "speaker":
        starts = {  # a training speaker must be new to the network that adapts to him
            speaker: pretrained(recordings, [s for s in train if s != speaker], words, options)
            for speaker in train
        }
        values = pretrained(recordings, train, words, options)
        every = dict.fromkeys(parts, words)
        title = f"{len(words)} words of a speaker who was not heard,"
        return field_of("speech-speaker", title, recordings, parts, every, values, starts, options)
    if len(words) < 3 * WAYS + 1:
        raise rnnopt.InputError(
            f"{len(words)} words: --unheard words needs {3 * WAYS + 1}, {WAYS} for the report, "
            f"{WAYS} to choose by and the rest to train on; record more, or pass --unheard speaker"
        )
    of = {
        "train": words[: -2 * WAYS],
        "validation": words[-2 * WAYS : -WAYS],
        "test": words[-WAYS:],
    }
    known = pretrained(recordings, train, of["train"], options)
    body = {name: value for name, value in known.items() if name.startswith("body")}
    values = {name: torch.zeros_like(v) for name, v in KeywordNet(WAYS).state_dict().items()}
    title = f"{WAYS} words that were not heard, of a speaker who was not heard either,"
    return field_of("speech-words", title, recordings, parts, of, values | body, {}, options)


def main(options: Options) -> None:
    """Read, pretrain, meta-train, compare."""
    for unheard in options.more["unheard"]:
        main_of(functools.partial(make_field, unheard=unheard))(options)


if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=100, episodes=40, more=MORE))

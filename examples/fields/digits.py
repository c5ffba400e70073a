"""Strings of spoken digits, of a speaker who has not been heard: CTC and the word error rate.

    python examples/fields/digits.py --data spoken_digits/recordings.zip --output out

DATA is that of speech.py: recordings of single words, named WORD_SPEAKER_NUMBER.wav. Recordings of
one speaker are joined to strings of three to five words, with pauses of up to 0.1 s. A small
convolutional network on log-mel features reads a string by connectionist temporal classification
(Graves et al. 2006). An episode brings one or five recordings of each word of a new speaker, in
strings, and is judged by the word error rate of strings of ten further ones of each word.

In the order of their names, two speakers are for the report, one is for choosing learning rates,
and the others are for training. In meta-training a speaker must be new to the network, too: each
training speaker has one that was pretrained on the others. Some minutes on two cores.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from collections.abc import Mapping, Sequence

import jiwer
import torch
from field import Field, Options, at_default, command, kept, main_of, unadapted
from language import pretrain
from speech import (
    HOP,
    MELS,
    QUERY,
    TRAIN_SHOTS,
    FromTask,
    Recordings,
    divided,
    log_mel,
    read_recordings,
)
from speech import (
    MORE as SPEECH,
)
from torch import Tensor, nn
from torch.nn.functional import ctc_loss

import rnnopt

MORE = {name: about for name, about in SPEECH.items() if name != "unheard"}
SHORTEST, LONGEST = 3, 5  # words of a string
PAUSE = 0.1  # seconds between two words, at most
BATCH = 32  # strings of a step of pretraining
Said = list[tuple[int, Tensor]]  # numbers of words, and their samples


class Reader(nn.Module):
    """Four convolutions over time with a norm of each frame, and a linear head; 0 is CTC's blank.

    Shapes: B strings, T frames of features, T' = T / 2 frames of output, rounded up.
    """

    def __init__(self, words: int, width: int = 48) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(inputs, width, 5, stride, 2 * gap, gap)
            for inputs, stride, gap in ((MELS, 2, 1), (width, 1, 1), (width, 1, 2), (width, 1, 2))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.convolutions)
        self.head = nn.Linear(width, 1 + words)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-probabilities (T', B, 1 + words) of features (B, MELS, T)."""
        for convolution, norm in zip(self.convolutions, self.norms):
            mel = norm(convolution(mel).relu().transpose(1, 2)).transpose(1, 2)
        return self.head(mel.permute(2, 0, 1)).log_softmax(dim=-1)


class Strings:
    """Strings of words with their features.

    Args:
        strings: the words of each, as numbers from 0 with their samples.
        drawn: draws the pauses.
        rate: samples a second.
    """

    def __init__(self, strings: Sequence[Said], drawn: random.Random, rate: int) -> None:
        hop, made = round(HOP * rate), []
        for said in strings:
            pauses = [torch.zeros(int(drawn.uniform(0, PAUSE) * rate)) for _ in said]
            sound = torch.cat([part for (_, x), quiet in zip(said, pauses) for part in (x, quiet)])
            made.append(log_mel(sound, rate, math.ceil(len(sound) / hop)))
        self.words = [[word for word, _ in said] for said in strings]
        lengths = [mel.shape[1] for mel in made]
        self.mel = torch.stack(
            [nn.functional.pad(mel, (0, max(lengths) - mel.shape[1])) for mel in made]
        )
        self.frames = torch.tensor([math.ceil(length / 2) for length in lengths])
        self.labels = torch.tensor([1 + word for words in self.words for word in words])
        self.counts = torch.tensor([len(words) for words in self.words])

    def loss(self, net: nn.Module) -> Tensor:
        """The CTC loss in nats a word."""
        return ctc_loss(net(self.mel), self.labels, self.frames, self.counts, zero_infinity=True)

    def word_error_rate(self, net: nn.Module) -> float:
        """Words left out, put in and exchanged by greedy decoding, as a share of the words."""
        best = net(self.mel).argmax(dim=-1).T  # (B, T')
        found = [
            " ".join(str(int(token) - 1) for token in row[:frames].unique_consecutive() if token)
            for row, frames in zip(best, self.frames)
        ]
        return float(jiwer.wer([" ".join(map(str, words)) for words in self.words], found))


def cut(said: Said, drawn: random.Random) -> list[Said]:
    """Recordings in random order, divided into strings of SHORTEST to LONGEST words or a few more.

    The last string takes up what would be too short for a string.
    """
    said, found = drawn.sample(said, len(said)), []
    while said:
        count = drawn.randint(SHORTEST, LONGEST)
        count = len(said) if len(said) < count + SHORTEST else count
        found.append(said[:count])
        said = said[count:]
    return found


class Episode(rnnopt.Task):
    """Some strings of a speaker to adapt to, others to be judged by, and where to start."""

    def __init__(
        self, recordings: Recordings, speaker: str, words: Sequence[str], shots: int,
        drawn: random.Random, rate: int, scored: bool, start: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.start = start
        rows = [drawn.sample(recordings[speaker, word], shots + QUERY) for word in words]
        self.seen, self.asked = (
            Strings(
                cut([(i, x) for i, row in enumerate(rows) for x in row[part]], drawn), drawn, rate
            )
            for part in (slice(shots), slice(shots, None))
        )

        def metrics(net: nn.Module) -> dict[str, float]:
            return {"WER": self.asked.word_error_rate(net)}

        super().__init__(
            lambda net, step: self.seen.loss(net),
            lambda net, step: self.asked.loss(net),
            metrics if scored else None,
            loss_unit=math.log(len(words)),
        )


def pretrained(
    recordings: Recordings, speakers: Sequence[str], words: Sequence[str], options: Options
) -> dict[str, Tensor]:
    """The values of a network that has learned to read strings of some speakers."""
    torch.manual_seed(options.seed)
    net, rate = Reader(len(words)), options.more["rate"]

    def loss(drawn: random.Random) -> Tensor:
        strings = []
        for _ in range(4 if options.small else BATCH):
            speaker = drawn.choice(speakers)
            chosen = [drawn.randrange(len(words)) for _ in range(drawn.randint(SHORTEST, LONGEST))]
            strings.append([(i, drawn.choice(recordings[speaker, words[i]])) for i in chosen])
        batch = Strings(strings, drawn, rate)
        band = drawn.randint(0, MELS - 6)
        batch.mel[:, band : band + 6] = 0  # SpecAugment, Park et al. 2019, arXiv:1904.08779
        return batch.loss(net)

    steps = 3 if options.small else 400
    facts = {"speakers": speakers, "words": words, "steps": steps, "seed": options.seed}
    facts["samples"] = sum(len(x) for s in speakers for word in words for x in recordings[s, word])
    return kept(
        options.output, "digits-model", {**facts, "rate": rate},
        lambda: pretrain(net, loss, steps, 4e-3, options.seed),
    )  # fmt: skip


def make_field(options: Options) -> Field:
    """Read the recordings, pretrain a network for each part, and say what a task is.

    Raises:
        InputError: the recordings can't be used.
    """
    rate, shots_of_report = options.more["rate"], options.more["shots"]
    recordings = read_recordings(options.data, rate, lambda sound, rate: sound)
    needed = max(*TRAIN_SHOTS, *shots_of_report) + QUERY
    parts, words = divided(recordings, options.more["test_speakers"], needed)
    train = parts["train"]
    starts = {  # a training speaker must be new to the network that adapts to him
        speaker: pretrained(recordings, [s for s in train if s != speaker], words, options)
        for speaker in train
    }
    net = Reader(len(words))
    net.load_state_dict(pretrained(recordings, train, words, options))

    def task(shots: int | None, part: str, number: int, scored: bool) -> Episode:
        drawn = random.Random(f"{options.seed} {part} {number}")
        speaker = drawn.choice(parts[part])
        shots = shots or drawn.choice(TRAIN_SHOTS)
        start = starts.get(speaker, {})
        return Episode(recordings, speaker, words, shots, drawn, rate, scored, start)

    return Field(
        "digits",
        f"Strings of {len(words)} words of a speaker who was not heard,",
        FromTask(net, head=["head.weight", "head.bias"]),
        functools.partial(task, None),
        metrics={"WER": rnnopt.Metric()},
        usual={"Adam at 0.001": at_default(torch.optim.Adam)},
        initial=("maml", "reptile"),
        settings={f"{shots}-shot": functools.partial(task, shots) for shots in shots_of_report},
        facts={"speakers": parts, "words": words, "rate": rate},
        direct={"none": unadapted},
        budgets=(1, 3, 10),
        meta_sgd=0.03,
    )


main = main_of(make_field)

if __name__ == "__main__":
    sys.exit(command(__doc__, main, meta_steps=100, episodes=40, more=MORE))

"""Fixtures for every test: offline, reproducible."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for a hub
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its fork warning is an error here

# how long an example takes says more of the machine than of the code
hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")

torch.set_num_threads(1)  # matrices here are tiny: more threads only wait for each other

THINGS = {
    "weather": ("rain", "snow", "sun", "storm", "fog", "wind"),
    "music": ("song", "jazz", "album", "band", "singer", "guitar"),
    "money": ("bank", "account", "euros", "card", "bill", "loan"),
    "food": ("table", "pizza", "soup", "cook", "menu", "lunch"),
    "travel": ("train", "flight", "hotel", "ticket", "taxi", "map"),
    "time": ("alarm", "clock", "hour", "morning", "wake", "timer"),
    "health": ("doctor", "pill", "fever", "nurse", "pain", "cough"),
    "sport": ("goal", "match", "team", "coach", "ball", "league"),
    "home": ("lamp", "door", "heating", "window", "garage", "sofa"),
    "work": ("meeting", "boss", "office", "report", "email", "desk"),
}
FRAMES = ("tell me about the {}", "i want a {} today", "is there any {} here", "my {} please")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def texts() -> list[tuple[str, str]]:
    """240 (text, label) pairs of 10 classes, told apart by their nouns."""
    return [
        (frame.format(noun), label)
        for label, nouns in THINGS.items()
        for noun in nouns
        for frame in FRAMES
    ]


@pytest.fixture(scope="session")
def csv_file(texts: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the texts in one CSV file with columns text and label."""
    path = tmp_path_factory.mktemp("data") / "things.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in texts))
    return path


@pytest.fixture(scope="session")
def encoder(texts: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT, 32 wide with 2 layers, and its tokenizer, in a folder."""
    from encoders import tiny_bert

    return tiny_bert(tmp_path_factory.mktemp("encoder") / "tiny", [text for text, _ in texts])

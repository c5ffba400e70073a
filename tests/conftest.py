"""Fixtures for every test: offline, reproducible."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for a hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its fork warning is an error here


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)

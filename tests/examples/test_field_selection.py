"""Response selection on generated dialogues: scores, what is kept, and what is no encoder."""

import json
import random

import pytest
import torch

pytest.importorskip("tokenizers")

import dialogue
import field
import selection
from language import pretrain

TOPICS = ("work", "school", "relationship", "tourism")
NOUNS = ("rain", "song", "bank", "pizza", "train", "alarm", "doctor", "goal", "lamp", "boss")


def dialogues(seed):
    """Ten dialogues of every topic and language, whose utterances share a noun."""
    drawn = random.Random(seed)
    found = []
    for topic in TOPICS:
        for name in ("en", "de", "it"):
            for _ in range(10):
                noun = drawn.choice(NOUNS)
                turns = [f"is there any {noun} {drawn.randrange(99)}", f"i want a {noun} today"]
                found.append({"turns": turns, "topic": topic, "language": name})
    return found


@pytest.fixture
def data(tmp_path, monkeypatch):
    for name, value in {"RANK": 4, "QUERY": 4, "CANDIDATES": 3}.items():
        monkeypatch.setattr(selection, name, value)
    for seed, stem in enumerate(("train", "test")):
        lines = [json.dumps(row) + "\n" for row in dialogues(seed)]
        (tmp_path / f"{stem}.jsonl").write_text("".join(lines))
    return tmp_path


def options(folder, encoder):
    defaults = {name: about.get("default") for name, about in selection.MORE.items()}
    more = defaults | {"encoder": str(encoder), "dialogues": [2]}
    return field.Options(folder, folder / "out", 1, 2, small=True, more=more)


def test_the_command_writes_a_table_for_topics_and_one_for_languages(
    data, encoder, exit_code, capsys
):
    words = ("--data", data, "--output", data / "out", "--small", "--dialogues", 2)
    assert exit_code(selection, *words, "--encoder", encoder) == 0
    table = capsys.readouterr().out
    assert table.count("recall@1 after") == table.count("loss after") == 2
    names = {path.name for path in (data / "out").iterdir()}
    for setting in ("topic", "language"):
        assert names >= {f"selection-{setting}.{suffix}" for suffix in ("md", "json", "png")}


def test_untrained_towers_score_by_cosine():
    towers = selection.Towers(6)
    said, utterances = torch.randn(3, 6), torch.randn(5, 6)
    wanted = torch.cosine_similarity(said.unsqueeze(1), utterances.unsqueeze(0), dim=-1)
    assert torch.allclose(towers(said, utterances), towers.sharpness.exp() * wanted, atol=1e-4)
    for_each = utterances.expand(3, 5, 6)
    assert torch.allclose(towers(said, for_each), towers(said, utterances), atol=1e-4)


def test_towers_learn_which_utterances_belong_together():
    torch.manual_seed(0)
    towers, said, utterances = selection.Towers(12), torch.randn(8, 12), torch.randn(8, 12)
    right = torch.arange(8)

    def loss(drawn):
        return torch.nn.functional.cross_entropy(towers(said, utterances), right)

    pretrain(towers, loss, 100, 1e-2, 0)
    assert torch.equal(towers(said, utterances).argmax(dim=1), right)


def test_scores_that_are_all_alike_find_nothing():
    scores = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [torch.nan, torch.nan]])
    assert selection.recall(scores) == 0.25


def test_vectors_are_kept_and_do_not_depend_on_the_batch(data, encoder, monkeypatch):
    pool = dialogue.pools(options(data, encoder))
    once = selection.vectors_of(pool, options(data, encoder))
    monkeypatch.setattr(selection, "encode", None)
    again = selection.vectors_of(pool, options(data, encoder))
    assert once.keys() == again.keys()
    assert all(torch.equal(once[text], again[text]) for text in once)
    monkeypatch.undo()
    text = max(once, key=len)
    (alone,) = selection.encode([text], str(encoder))
    assert torch.allclose(alone, once[text], atol=1e-5)


def test_what_is_no_encoder_exits_with_2(data, exit_code, capsys):
    words = ("--data", data, "--output", data / "out", "--dialogues", 2)
    assert exit_code(selection, *words, "--encoder", data) == 2
    assert f"--encoder {data}: is no encoder of transformers" in capsys.readouterr().err

"""Dialogue on generated dialogues: what is scored, which topics are apart, and empty dialogues."""

import json
import random

import pytest
import torch

pytest.importorskip("tokenizers")

import dialogue
import field

TOPICS = ("work", "school", "relationship", "tourism")
WORDS = ("yes", "no", "why", "when", "there", "here", "good", "bad", "tea", "milk")


@pytest.fixture
def tiny(monkeypatch):
    """A model that takes a second."""
    sizes = {"WIDTH": 16, "LAYERS": 1, "TOKENS": 280, "CONTEXT": 8, "RESPONSE": 6, "QUERY": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(dialogue, name, value)


def dialogues(seed):
    """Twenty dialogues of every topic and language."""
    drawn = random.Random(seed)
    return [
        {
            "turns": [" ".join(drawn.sample(WORDS, 3)) for _ in range(drawn.randint(2, 4))],
            "topic": topic,
            "language": name,
        }
        for topic in TOPICS
        for name in ("en", "de", "it")
        for _ in range(20)
    ]


@pytest.fixture
def data(tmp_path, tiny):
    for seed, stem in enumerate(("train", "test")):
        write(tmp_path / f"{stem}.jsonl", dialogues(seed))
    return tmp_path


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(folder, **more):
    defaults = {name: about["default"] for name, about in dialogue.MORE.items()}
    return field.Options(folder, folder / "out", 2, 2, small=True, more=defaults | more)


def speaker(data):
    return dialogue.make_speaker(dialogue.pools(options(data))["pretrain"], options(data))


def test_the_command_writes_a_table_for_topics_and_one_for_languages(data, exit_code, capsys):
    words = ("--data", data, "--output", data / "out", "--small", "--dialogues", 2)
    assert exit_code(dialogue, *words) == 0
    table = capsys.readouterr().out
    for metric in ("perplexity after", "loss after"):
        assert table.count(metric) == 2
    names = {path.name for path in (data / "out").iterdir()}
    for setting in ("topic", "language"):
        assert names >= {f"dialogue-{setting}.{suffix}" for suffix in ("md", "json", "png")}


def test_no_tested_topic_or_language_is_trained_or_tuned_on(data):
    pools = dialogue.pools(options(data))
    topics = {part: {d.topic for d in found} for part, found in pools.items()}
    assert topics["pretrain"] == topics["train"] == {"work", "school"}
    assert topics["validation"] == {"relationship"}
    assert topics["topic"] == topics["language"] == {"tourism"}
    assert {d.language for d in pools["topic"]} == {"en"}
    assert {d.language for d in pools["language"]} == {"it"}
    assert all(d.language != "it" for part in ("pretrain", "train") for d in pools[part])
    held = {id(d) for d in pools["train"]}
    assert not held & {id(d) for d in pools["pretrain"]}


def test_only_the_next_utterance_counts(data):
    """The loss is the mean over its tokens, and padding changes nothing."""
    made = speaker(data)
    examples = made.examples(["tea or milk", "tea", "why not milk here"])
    assert all(len(context) <= dialogue.CONTEXT for context, _ in examples)
    together = made.model(**made.batch(examples)).loss
    alone = [made.model(**made.batch([example])).loss for example in examples]
    lengths = [len(response) for _, response in examples]
    weighted = sum(n * loss for n, loss in zip(lengths, alone)) / sum(lengths)
    assert torch.allclose(together, weighted, atol=1e-4)
    assert made.batch(examples)["labels"].ne(dialogue.IGNORED).sum() == sum(lengths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": []}, r"train.jsonl, line 1: turns=[]: a dialogue needs a list of at least 2"),
        ({"turns": ["hello"]}, "line 1: turns=['hello']: a dialogue needs a list of at least 2"),
        ({"turns": ["hello", " "]}, "line 1: utterance 2 is ' ', and needs some text; fill it in"),
        ({"topic": None}, "line 1: topic=None: must be text"),
    ],
)
def test_a_dialogue_that_can_not_be_used_exits_with_2(data, exit_code, capsys, change, message):
    rows = dialogues(0)
    write(data / "train.jsonl", [rows[0] | change, *rows[1:]])
    words = ("--data", data, "--output", data / "out")
    assert exit_code(dialogue, *words) == 2
    assert message in capsys.readouterr().err
    assert not (data / "out").exists()


def test_too_few_dialogues_exit_with_2(data, exit_code, capsys):
    words = ("--data", data, "--output", data / "out", "--dialogues", 90)
    assert exit_code(dialogue, *words) == 2
    assert "has 10 dialogues, and an episode needs 93; choose other" in capsys.readouterr().err

"""Low-resource languages: who sees which language and text, and a run on made-up ones."""

import gzip
import json

import field
import languages
import pytest

import rnnopt
from tests.encoders import tiny_bert

WORDS = {
    "good": ("fine", "nice", "lovely", "great"),
    "bad": ("poor", "awful", "dull", "sad"),
}
SPOKEN = ("aa", "bb", "cc", "dd")  # the endings that make a word one of the language


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same sentences in four languages, 24 of each label in each file."""
    folder = tmp_path_factory.mktemp("languages")
    for stem in ("train", "val", "test"):
        lines = [
            {"text": f"{stem}{n}{end} {word}{end}", "label": label, "domain": end}
            for end in SPOKEN
            for label, words in WORDS.items()
            for n in range(6)
            for word in words
        ]
        content = "\n".join(map(json.dumps, lines)).encode()
        (folder / f"sentiment.{stem}.jsonl.gz").write_bytes(gzip.compress(content))
    return folder


def options(data, output, **more):
    more = {"encoder": "absent", "shots": [2], "test": ["dd"], "validation": ["cc"], **more}
    return field.Options(data, output, meta_steps=1, episodes=2, small=True, more=more)


def test_a_test_language_and_its_texts_are_of_no_other_part(data, tmp_path):
    parts = languages.read(options(data, tmp_path))
    assert {part: set(corpus.domains) for part, corpus in parts.items()} == {
        "pretraining": {"aa", "bb"}, "train": {"aa", "bb"}, "validation": {"cc"}, "test": {"dd"},
    }  # fmt: skip
    sentences = {
        part: {text.split()[0][:-2] for text in corpus.texts} for part, corpus in parts.items()
    }
    assert not sentences["test"] & (sentences["train"] | sentences["validation"])
    texts = {part: set(corpus.texts) for part, corpus in parts.items()}
    assert not texts["pretraining"] & texts["train"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"test": ["klingon"]}, "'klingon' is no language.*aa, bb, cc, dd"),
        ({"test": ["cc"]}, "no language may be in both"),
        ({"test": ["aa", "bb", "dd"]}, "must be left to train on"),
    ],
)
def test_languages_that_can_not_be_left_out_are_named(data, tmp_path, more, message):
    with pytest.raises(rnnopt.InputError, match=message):
        languages.read(options(data, tmp_path, **more))


def test_a_run_has_logistic_regressions_as_rows(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(languages, "TRAIN_SHOTS", (1, 2))
    monkeypatch.setattr(languages, "QUERY", 3)
    encoder = tiny_bert(tmp_path / "encoder")
    languages.main(options(data, tmp_path, encoder=str(encoder)))
    shown = capsys.readouterr().out
    for row in ("logistic regression on letters", "logistic regression on embeddings", "f1 after"):
        assert row in shown
    assert (tmp_path / "languages-2-shot.json").exists()

"""What the examples of language share: files, a tokenizer with all letters, and ciphers."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnopt import InputError

pytest.importorskip("tokenizers")

import language

TOKENIZER = language.train_tokenizer(["a man in a boat", "a boat"], 280, ["<de>"])


@given(st.text(min_size=1).filter(lambda text: text == text.strip()))
def test_any_text_can_be_read_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids).strip() == text


def test_special_tokens_are_where_the_models_expect_them():
    tokens = (language.PAD, language.START, language.END, "<de>")
    assert [TOKENIZER.token_to_id(token) for token in tokens] == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_a_cipher_exchanges_letters_one_for_one(seed):
    letters = language.CONSONANTS + language.VOWELS
    found = letters.translate(language.cipher(seed))
    assert sorted(found) == sorted(letters) and found != letters
    assert letters.upper().translate(language.cipher(seed)) == found.upper()
    assert "12, !".translate(language.cipher(seed)) == "12, !"


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.tsv"])
def test_rows_are_the_same_from_every_kind_of_file(tmp_path, name):
    wanted = [{"en": "a man", "de": "ein „Mann“"}, {"en": 'a "dog"', "de": "Hund"}]
    if name == "train.tsv":
        text = "en\tde\n" + "".join(f"{row['en']}\t{row['de']}\n" for row in wanted)
    else:
        text = "".join(json.dumps(row) + "\n" for row in wanted)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert [row for _, row in language.rows(language.find(tmp_path, "train"))] == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "en\tde\na\tb\nc\n", r"line 3: has 1 columns, the header 2 \(en, de\)"),
        ("x.tsv", "en\tde\na\tb\tc\n", "line 2: has 3 columns, the header 2"),
        ("x.jsonl", "{}\n{", "line 2: not JSON"),
        ("x.jsonl", "[1]", "line 1: a JSON list; write an object a line"),
        ("x.jsonl.gz", "{}", "x.jsonl.gz: can't be read"),
    ],
)
def test_a_row_that_can_not_be_used_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(language.rows(tmp_path / name))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has none of train.jsonl, train.jsonl.gz, train.tsv"):
        language.find(tmp_path, "train")

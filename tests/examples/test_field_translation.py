"""Translation on generated sentences: metrics, what is never seen, and pairs that lack a side."""

import json
import random

import pytest
import torch

pytest.importorskip("sacrebleu")

import field
import translation
from language import pretrain

NOUNS = {"man": ("Mann", "homme", "muž"), "dog": ("Hund", "chien", "pes")}
PLACES = {"boat": ("Boot", "bateau", "loď"), "park": ("Park", "parc", "parku")}
LANGUAGES = ("en", "de", "fr", "cs")


def sentences(count, seed=0):
    """Rows with a sentence in four languages."""
    drawn = random.Random(seed)
    found = []
    for _ in range(count):
        (noun, others), (place, where) = (
            drawn.choice(list(table.items())) for table in (NOUNS, PLACES)
        )
        number = drawn.randrange(100)
        texts = zip((noun, *others), (place, *where))
        found.append({name: f"{number} {a} {b}" for name, (a, b) in zip(LANGUAGES, texts)})
    return found


@pytest.fixture
def tiny(monkeypatch):
    """A model that takes a second."""
    for name, value in {"WIDTH": 16, "LAYERS": 1, "TOKENS": 300, "LONGEST": 12, "QUERY": 3}.items():
        monkeypatch.setattr(translation, name, value)


@pytest.fixture
def data(tmp_path, tiny):
    for seed, (stem, count) in enumerate({"train": 200, "val": 8, "test": 8}.items()):
        lines = [json.dumps(row) + "\n" for row in sentences(count, seed)]
        (tmp_path / f"{stem}.jsonl").write_text("".join(lines))
    return tmp_path


def options(folder, **more):
    defaults = {name: about["default"] for name, about in translation.MORE.items()}
    return field.Options(folder, folder / "out", 2, 2, small=True, more=defaults | more)


def test_the_command_writes_table_figures_and_picture(data, exit_code, capsys):
    words = ("--data", data, "--output", data / "out", "--small", "--pairs", 4)
    assert exit_code(translation, *words) == 0
    table = capsys.readouterr().out
    for metric in ("chrF after", "BLEU after", "loss after", "adafactor-default"):
        assert metric in table
    names = {path.name for path in (data / "out").iterdir()}
    assert names >= {f"translation-4-pairs.{suffix}" for suffix in ("md", "json", "png")}
    figures = json.loads((data / "out" / "translation-4-pairs.json").read_text())
    assert figures["values"]["learned"]["loss"].keys() == {"1", "2"}


def test_greedy_decoding_is_that_of_transformers(data):
    translator = translation.make_translator(sentences(60), options(data))
    batch = translator.batch([("3 man boat", "x"), ("75 dog park", "y")], "<de>")
    ours = translator.translate(translator.model, batch)
    theirs = translator.model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        max_new_tokens=translation.LONGEST, num_beams=1, do_sample=False,
    )  # fmt: skip
    assert ours == [translator.tokenizer.decode(ids).strip() for ids in theirs.tolist()]


def test_what_was_learned_is_translated(data):
    rows = [{"en": "3 man boat", "de": "Drei Mann", "fr": "Drei Mann", "cs": "x"}] * 64
    translator = translation.make_translator(rows, options(data, known=["de"]))
    batch = translator.batch([("3 man boat", "Drei Mann")], "<de>")
    pretrain(translator.model, lambda drawn: translator.model(**batch).loss, 60, 1e-2, 0)
    assert translator.translate(translator.model, batch) == ["Drei Mann"]


def test_few_rows_leave_enough_to_choose_learning_rates_on(data):
    """A fifth of 200 rows would leave 10 for validation, and an episode takes 25."""
    (data / "val.jsonl").write_text((data / "train.jsonl").read_text())
    made = translation.make_field(options(data, pairs=[22]))
    task = made.settings["22-pairs"]("validation", 0, True)
    assert len(task.query) == 3
    made.learner.begin(task, 0)
    copied = translation.copied(made.learner, task)
    assert copied["loss"] == pytest.approx(field.unadapted(made.learner, task)["loss"])
    task.query = [(to, to) for _, to in task.query]
    assert translation.copied(made.learner, task)["chrF"] == pytest.approx(100)


def test_the_unseen_language_is_not_in_the_model(data):
    """The same model comes of training rows without the language that is adapted to."""
    rows = sentences(60)
    without = [{name: row[name] for name in ("en", "de", "fr")} for row in rows]
    one, other = (
        translation.make_translator(found, options(data / name))
        for name, found in (("a", rows), ("b", without))
    )
    assert one.tokenizer.to_str() == other.tokenizer.to_str()
    for left, right in zip(one.model.parameters(), other.model.parameters()):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cs": " "},
            r"train.jsonl, line 1: 'cs' is empty, the columns are en, de, fr, cs; a pair",
        ),
        ({"cs": None}, "train.jsonl, line 1: 'cs' is empty"),
        ({"cs": ...}, "train.jsonl, line 1: 'cs' is missing, the columns are en, de, fr; a pair"),
    ],
)
def test_a_pair_without_one_side_exits_with_2(data, exit_code, capsys, change, message):
    rows = sentences(3)
    rows[0] = {name: text for name, text in (rows[0] | change).items() if text is not ...}
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--data", data, "--output", data / "out")
    assert exit_code(translation, *words) == 2
    assert message in capsys.readouterr().err
    assert not (data / "out").exists()


def test_unequal_columns_and_too_few_rows_exit_with_2(data, exit_code, capsys):
    words = ("--data", data, "--output", data / "out")
    assert exit_code(translation, *words, "--pairs", 500) == 2
    assert "--pairs 500: train has 200 rows, and needs 2012" in capsys.readouterr().err
    (data / "train.jsonl").unlink()
    (data / "train.tsv").write_text("en\tde\tfr\tcs\na\tb\tc\td\na\tb\tc\n")
    assert exit_code(translation, *words) == 2
    assert "train.tsv, line 3: has 3 columns, the header 4" in capsys.readouterr().err

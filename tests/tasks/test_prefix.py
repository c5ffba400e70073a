"""What frozen layers make of a text is computed once, and nothing else changes by it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from encoders import TEXTS, tiny_bert, tiny_encoder
from rule_table import random_lstm
from torch import Tensor, nn

from rnnopt import SGD, LearnedOptimizer
from rnnopt.errors import InputError
from rnnopt.meta.differentiable import higher
from rnnopt.meta.settings import UnrollSettings
from rnnopt.meta.unroll import unroll
from rnnopt.tasks.adaptation import adapt_and_judge
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.layers import layer_stack
from rnnopt.tasks.text.encoder.prefix import Prefix
from rnnopt.tasks.text.tasks import LabelledTexts, TextTask

CPU = torch.device("cpu")
LABELS = [i % 3 for i in range(len(TEXTS))]
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 500}
CONFIGS = {
    "distilbert": transformers.DistilBertConfig(
        dim=32, n_layers=3, n_heads=2, hidden_dim=64, vocab_size=500
    ),
    "roberta": transformers.RobertaConfig(
        **SMALL, intermediate_size=64, max_position_embeddings=20, pad_token_id=0
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=2, vocab_size=500, n_positions=64, bos_token_id=2,
        eos_token_id=3,
    ),
    "mpnet": transformers.MPNetConfig(**SMALL, intermediate_size=64),  # a layer returns a tuple
    "modernbert": transformers.ModernBertConfig(
        **SMALL, intermediate_size=64, pad_token_id=0, cls_token_id=2, sep_token_id=3
    ),  # the model reads attributes of its layers
    "albert": transformers.AlbertConfig(**SMALL, intermediate_size=64, embedding_size=16),
    "deberta": transformers.DebertaV2Config(**SMALL, intermediate_size=64, relative_attention=True),
    "fnet": transformers.FNetConfig(
        hidden_size=32, num_hidden_layers=3, intermediate_size=64, vocab_size=500
    ),  # takes no mask: a text's states depend on its padding
}  # fmt: skip
OPTIONS = {
    "head": {"tune": "head"},
    "mean": {"tune": "head", "pooling": "mean"},
    "lora": {"tune": "lora", "top_layers": 1},
    "full": {"tune": "full", "top_layers": 1},
    "two": {"tune": "full", "top_layers": 2, "pooling": "mean"},
}
every_encoder = pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2"])
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    made = {kind: tiny_encoder(root / kind, config) for kind, config in CONFIGS.items()}
    return {**made, "bert": tiny_bert(root / "bert", layers=3)}


def load(encoder: Path, **options: object) -> Classifier:
    return Classifier.load(encoder, ways=3, device=CPU, **options)


def read(classifier: Classifier, cached: bool = True) -> LabelledTexts:
    texts = LabelledTexts.read(classifier, TEXTS, LABELS, again=cached)
    assert all((batch.kept is not None) == cached for batch, _ in texts.pieces)
    return texts


def gradients(classifier: Classifier, texts: LabelledTexts) -> list[Tensor]:
    """The loss, and its gradient in every trainable parameter."""
    loss = texts.loss(classifier, classifier.model)
    return [loss, *torch.autograd.grad(loss, [param for _, param in classifier.trainable()])]


def assert_same(ours: object, plain: object) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


class Calls:
    """Counts the runs of a module's parts."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        for part in list(module.modules())[1:]:
            part.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


# ------------------------------------------------------------------------ the same results


@every_encoder
@every_option
def test_losses_and_gradients_are_the_same(
    folders: dict[str, Path], kind: str, options: dict[str, object]
) -> None:
    classifier = load(folders[kind], **options)
    with torch.no_grad():  # LoRA's factors B are zero at first, and so are A's gradients
        for _, param in classifier.trainable():
            param.add_(0.02 * torch.randn_like(param))
    ours, plain = (gradients(classifier, read(classifier, cached)) for cached in (True, False))
    assert_same(ours, plain)
    assert all(gradient.any() for gradient in plain)


@every_encoder
@every_option
def test_adaptation_is_the_same(
    folders: dict[str, Path], kind: str, options: dict[str, object]
) -> None:
    classifier = load(folders[kind], **options)
    reached = []
    for cached in (True, False):
        classifier.reset(3, seed=1)
        optimizer = LearnedOptimizer([p for _, p in classifier.trainable()], SGD(0.1))
        texts = read(classifier, cached)
        done = adapt_and_judge(
            classifier, optimizer, TextTask(classifier, (texts,), texts, 3), (4,)
        )
        reached.append([p.detach().clone() for _, p in classifier.trainable()])
        reached[-1].append(torch.tensor(done.scores[4]["loss"]))
    assert_same(*reached)


@pytest.mark.parametrize("kind", ["mpnet", "modernbert", "deberta"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_layers_of_other_makes_are_cached_too(
    folders: dict[str, Path], kind: str, tune: str
) -> None:
    classifier = load(folders[kind], tune=tune, top_layers=1)
    ours, plain = (gradients(classifier, read(classifier, cached)) for cached in (True, False))
    assert_same(ours, plain)


def test_albert_is_cached_below_the_head(folders: dict[str, Path]) -> None:
    classifier = load(folders["albert"], tune="head")
    ours, plain = (gradients(classifier, read(classifier, cached)) for cached in (True, False))
    assert_same(ours, plain)


@pytest.mark.parametrize(("kind", "cached"), [("roberta", True), ("gpt2", False)])
def test_padding_may_stand_on_the_left(
    folders: dict[str, Path], tmp_path: Path, kind: str, cached: bool
) -> None:
    """GPT-2 counts positions from the padding: there a text's states depend on its batch."""
    folder = Path(shutil.copytree(folders[kind], tmp_path / kind))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    classifier = load(folder, tune="full", top_layers=1, pooling="mean")
    assert not classifier.tokens.batch(TEXTS)["attention_mask"][:, 0].all()
    ours = LabelledTexts.read(classifier, TEXTS, LABELS)
    assert all((batch.kept is not None) == cached for batch, _ in ours.pieces)
    assert_same(gradients(classifier, ours), gradients(classifier, read(classifier, False)))


def test_states_do_not_depend_on_the_texts_beside(folders: dict[str, Path]) -> None:
    """Or a resumed run would not end with the same weights, bit for bit."""
    alone, together = (load(folders["bert"], tune="head") for _ in range(2))
    together.batch(TEXTS)
    ours, expected = (c.logits(c.batch(TEXTS[:2])) for c in (together, alone))
    assert torch.equal(ours, expected)


def test_what_is_kept_outlives_a_reset(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], tune="lora", top_layers=1)
    texts = read(classifier)
    optimizer = LearnedOptimizer([p for _, p in classifier.trainable()], SGD(1.0))
    adapt_and_judge(classifier, optimizer, TextTask(classifier, (texts,), texts, 3), (3,))
    classifier.reset(5, seed=2)
    assert_same(gradients(classifier, texts), gradients(classifier, read(classifier, False)))


def test_texts_read_in_inference_mode_can_be_learned_from(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], tune="full", top_layers=1)
    with torch.inference_mode():
        classifier.batch(TEXTS)
    assert_same(gradients(classifier, read(classifier)), gradients(classifier, read(classifier)))


# ------------------------------------------------------------------------- computed once


@every_encoder
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_lower_layers_run_once_for_a_text(folders: dict[str, Path], kind: str, tune: str) -> None:
    classifier = load(folders[kind], tune=tune, top_layers=1)
    lower, top = (Calls(layer_stack(classifier.model.base_model)[i]) for i in (0, 2))
    texts = read(classifier)
    once = lower.count
    assert once > 0 and top.count == 0
    for _ in range(3):
        gradients(classifier, texts)
        gradients(classifier, read(classifier))
    assert lower.count == once and top.count > 0
    classifier.batch(["a text that is new"])
    assert lower.count > once
    gradients(classifier, read(classifier, cached=False))
    assert lower.count > 1.1 * once


@every_encoder
def test_under_a_head_the_encoder_runs_once_for_a_text(folders: dict[str, Path], kind: str) -> None:
    classifier = load(folders[kind], tune="head")
    calls = Calls(classifier.model.base_model)
    texts = read(classifier)
    once = calls.count
    gradients(classifier, texts)
    gradients(classifier, read(classifier))
    assert calls.count == once > 0


def test_a_functional_copy_takes_what_is_kept(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], tune="head", double_backward=True)
    texts = read(classifier)
    runs = Calls(layer_stack(classifier.model.base_model)[0])
    loss = texts.loss(classifier, classifier.model)
    optimizer = LearnedOptimizer([p for _, p in classifier.trainable()], random_lstm())
    with higher.innerloop_ctx(classifier.model, optimizer) as (copy, _):
        copied = Calls(copy.get_submodule("bert.encoder.layer.0"))
        assert torch.equal(texts.loss(classifier, copy), loss)
        assert copied.count == runs.count == 0
        texts.loss(classifier, copy.train())
        assert copied.count > 0


def test_what_does_not_fit_in_memory_is_kept_on_disk(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    classifier = load(folders["bert"], tune="head")
    layers = [classifier.model.base_model]
    batch = classifier.tokens.batch(TEXTS)
    whole, part, none = (
        Prefix(classifier.model, classifier.tokens, layers, memory=memory)
        for memory in (10**6, 3000, 0)
    )
    expected = whole.read(batch, TEXTS)
    for prefix in (part, none):
        for _ in range(2):  # as computed, and as kept
            assert torch.equal(prefix.read(batch, TEXTS), expected)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    whole.read(classifier.tokens.batch(["a new text"]), ["a new text"])
    fresh = Prefix(classifier.model, classifier.tokens, layers, memory=0)
    with pytest.raises(InputError, match=r"can't keep activations in .*absent: No such .* TMPDIR"):
        fresh.read(batch, TEXTS)


# ------------------------------------------------------------------- where it must not be used


@pytest.mark.parametrize(
    "options",
    [
        {"tune": "full"},
        {"tune": "lora"},  # the embeddings alone are no reason to keep anything
        {"tune": "full", "top_layers": 3},
        {"tune": "head", "dropout": True},
        {"tune": "lora", "top_layers": 1, "dropout": True},
    ],
)
def test_nothing_is_kept_where_nothing_stays_the_same(
    folders: dict[str, Path], options: dict[str, object]
) -> None:
    read(load(folders["bert"], **options), cached=False)
    assert load(folders["bert"], **options).batch(TEXTS).kept is None


def test_a_text_that_is_read_once_is_not_kept(folders: dict[str, Path]) -> None:
    assert load(folders["bert"], tune="head").batch(TEXTS, again=False).kept is None


def test_with_dropout_switched_on_later_everything_runs(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], tune="lora", top_layers=1)
    lower = Calls(layer_stack(classifier.model.base_model)[0])
    batch = classifier.batch(TEXTS)
    once = lower.count
    classifier.model.train()
    classifier.logits(batch)
    assert lower.count > once


def test_another_classifiers_batch_is_read_anew(folders: dict[str, Path]) -> None:
    one, other = (load(folders["bert"], tune="full", top_layers=k) for k in (2, 1))
    plain = other.logits(other.batch(TEXTS, again=False))
    assert torch.equal(other.logits(one.batch(TEXTS)), plain)


def test_a_layer_that_trains_does_not_pass_for_frozen(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], tune="full", top_layers=1)
    layers = list(layer_stack(classifier.model.base_model))
    assert Prefix(classifier.model, classifier.tokens, layers[:2]).works(CPU)
    assert not Prefix(classifier.model, classifier.tokens, layers).works(CPU)


def test_results_that_differ_are_noticed(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], tune="head")
    layers = list(layer_stack(classifier.model.base_model))
    hook = layers[1].register_forward_hook(lambda module, args, output: output + torch.rand(1))
    assert not Prefix(classifier.model, classifier.tokens, layers).works(CPU)
    hook.remove()
    assert Prefix(classifier.model, classifier.tokens, layers).works(CPU)


@pytest.mark.parametrize("options", [OPTIONS["head"], OPTIONS["full"]], ids=["head", "full"])
def test_an_encoder_of_another_build_works_uncached(
    folders: dict[str, Path], options: dict[str, object]
) -> None:
    classifier = load(folders["fnet"], **options)
    texts = LabelledTexts.read(classifier, TEXTS, LABELS)
    assert all(batch.kept is None for batch, _ in texts.pieces)
    assert all(gradient.isfinite().all() for gradient in gradients(classifier, texts))


@pytest.mark.parametrize("options", [OPTIONS["head"], OPTIONS["lora"]], ids=["head", "lora"])
@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradients_are_the_same(
    folders: dict[str, Path], options: dict[str, object], order: int
) -> None:
    classifier = load(folders["bert"], double_backward=True, **options)
    found = []
    for cached in (True, False):
        rule = random_lstm()
        optimizer = LearnedOptimizer([p for _, p in classifier.trainable()], rule, lr=0.1)
        task = TextTask(classifier, (read(classifier, cached),), read(classifier, cached), 3)
        unroll(
            classifier.model,
            optimizer,
            task.support_loss,
            task.query_loss,
            UnrollSettings(steps=3, order=order),
        )
        found.append([weight.grad for weight in rule.parameters()])
    assert any(gradient.any() for gradient in found[1])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------ top layers


def trained(classifier: Classifier) -> set[str]:
    """Where the trainable parameters are: names without the last three parts of a layer's."""
    names = [name.split(".") for name, _ in classifier.trainable()]
    numbers = [[i for i, part in enumerate(name) if part.isdigit()] for name in names]
    return {".".join(n[: at[0] + 1] if at else n[:-1]) for n, at in zip(names, numbers)}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bert", {"bert.encoder.layer.2", "bert.pooler.dense", "classifier"}),
        ("distilbert", {"distilbert.transformer.layer.2", "pre_classifier", "classifier"}),
        ("gpt2", {"transformer.h.2", "transformer.ln_f", "score"}),
    ],
)
def test_full_trains_the_top_layers_and_what_lies_above(
    folders: dict[str, Path], kind: str, expected: set[str]
) -> None:
    assert trained(load(folders[kind], tune="full", top_layers=1)) == expected


@every_encoder
def test_lora_has_factors_in_the_top_layers_alone(folders: dict[str, Path], kind: str) -> None:
    classifier = load(folders[kind], tune="lora", top_layers=2)
    layers = layer_stack(classifier.model.base_model)
    factors = [any("lora_" in name for name, _ in layer.named_parameters()) for layer in layers]
    assert factors == [False, True, True]


def test_as_many_top_layers_as_there_are_leave_out_the_embeddings(
    folders: dict[str, Path],
) -> None:
    names, every = (
        {name for name, _ in load(folders["bert"], tune="full", top_layers=k).trainable()}
        for k in (3, None)
    )
    assert {name.split(".")[1] for name in every - names} == {"embeddings"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {"top_layers": 0}, "top_layers is 0; it must be at least 1: for none, use --tun"),
        ("bert", {"top_layers": 4}, "top_layers is 4: the encoder has 3 layers; give at most that"),
        ("bert", {"top_layers": 1, "tune": "head"}, "top_layers is 1, .* no layer trains; leave"),
        ("albert", {"top_layers": 1}, "top_layers is 1: the layers of albert models can't be iden"),
    ],
)
def test_top_layers_that_cannot_be_had_are_errors(
    folders: dict[str, Path], kind: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(folders[kind], **options)


# ------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("options", [{"tune": "full"}, *OPTIONS.values()])
def test_bfloat16_tracks_float32_and_leaves_parameters_alone(
    folders: dict[str, Path], options: dict[str, object]
) -> None:
    reached = []
    for precision in ("bf16", "fp32"):
        classifier = load(folders["bert"], precision=precision, **options)
        assert classifier.precision == precision
        params = [param for _, param in classifier.trainable()]
        texts = LabelledTexts.read(classifier, TEXTS, LABELS)
        loss, *grads = gradients(classifier, texts)
        assert {tensor.dtype for tensor in (loss, *grads, *params)} == {torch.float32}
        done = adapt_and_judge(
            classifier,
            LearnedOptimizer(params, SGD(0.3)),
            TextTask(classifier, (texts,), texts, 3),
            (5,),
        )
        reached.append(torch.tensor([float(loss.detach()), done.scores[5]["loss"]]))
    assert torch.allclose(*reached, atol=0.02)
    assert not torch.equal(*reached)


def test_bfloat16_works_at_second_order(folders: dict[str, Path]) -> None:
    classifier = load(folders["bert"], tune="head", precision="bf16", double_backward=True)
    rule = random_lstm()
    optimizer = LearnedOptimizer([p for _, p in classifier.trainable()], rule, lr=0.1)
    loss = TextTask(classifier, (read(classifier),), read(classifier), 3).support_loss
    unroll(classifier.model, optimizer, loss, loss, UnrollSettings(steps=2, order=2))
    assert all(weight.grad.isfinite().all() for weight in rule.parameters())


def test_precision_on_a_cpu_is_float32_unless_asked_for(folders: dict[str, Path]) -> None:
    one, other = (load(folders["bert"], precision=name) for name in ("auto", "fp32"))
    assert one.precision == "fp32"
    assert torch.equal(one.logits(one.batch(TEXTS)), other.logits(other.batch(TEXTS)))

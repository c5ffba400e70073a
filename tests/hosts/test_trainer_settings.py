"""`trainer_settings`: Trainer ends where a plain loop ends."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from encoders import TEXTS, checkpointing
from rule_table import random_lstm

from rnnopt import SGD, LearnedOptimizer, trainer_settings
from rnnopt.errors import InputError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
LABELS = [0, 1] * 4
STEPS = 3


@pytest.fixture
def model(encoder):
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(encoder)


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return transformers.AutoTokenizer.from_pretrained(encoder)


def logits(model, tokenizer):
    """What is compared. Weights may differ: the gradient of a key's bias is 0 up to rounding, and
    Adam steps by its sign."""
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXTS[:8], padding=True, return_tensors="pt")).logits


def plain_loop(model, tokenizer, rule):
    """Logits at the start and at the end."""
    model = copy.deepcopy(model).eval()  # dropout off
    before = logits(model, tokenizer)
    batch = tokenizer(TEXTS[:8], padding=True, return_tensors="pt")
    optimizer = LearnedOptimizer(model.parameters(), rule)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch, labels=torch.tensor(LABELS)).loss.backward()
        optimizer.step()
    return before, logits(model, tokenizer)


def arguments(folder, **options):
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no", dataloader_pin_memory=False, **options,
    )  # fmt: skip


def by_trainer(settings, tokenizer):
    rows = [{**tokenizer(text), "labels": label} for text, label in zip(TEXTS, LABELS)]
    trainer = transformers.Trainer(
        **settings,
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Trainer's own, of transformers 5.23 on torch 2.13
        trainer.train()
    return logits(trainer.model, tokenizer)


def distance(first, second):
    return float((first - second).abs().max())


@pytest.mark.parametrize(
    "make", [lambda: None, lambda: SGD(0.5), random_lstm], ids=["shipped", "SGD", "LSTM"]
)
@pytest.mark.parametrize("accumulated", [1, 4])
def test_trainer_ends_where_a_plain_loop_ends(make, accumulated, model, tokenizer, tmp_path):
    """Also where the loss is accumulated over batches; the rule of SGD shows every scale."""
    rule = make()
    before, wanted = plain_loop(model, tokenizer, rule)
    options = {
        "per_device_train_batch_size": 8 // accumulated,
        "gradient_accumulation_steps": accumulated,
    }
    settings = trainer_settings(model, arguments(tmp_path, **options), rule)
    found = by_trainer(settings, tokenizer)
    assert distance(found, wanted) < 0.01 * distance(before, wanted)


def test_without_it_the_loss_has_another_scale(model, tokenizer, tmp_path):
    """What the test above guards against, in transformers 5.23."""
    before, wanted = plain_loop(model, tokenizer, SGD(0.5))
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    settings = trainer_settings(model, arguments(tmp_path, **options), SGD(0.5))
    model.accepts_loss_kwargs = True
    assert distance(by_trainer(settings, tokenizer), wanted) > 0.5 * distance(before, wanted)


def test_gradient_checkpointing_takes_the_same_steps(model, tokenizer, tmp_path):
    before, wanted = plain_loop(model, tokenizer, SGD(0.5))
    options = {"per_device_train_batch_size": 8, checkpointing(): True}
    settings = trainer_settings(model, arguments(tmp_path, **options), SGD(0.5))
    found = by_trainer(settings, tokenizer)
    assert getattr(settings["model"], f"is_{checkpointing()}")
    assert distance(found, wanted) < 0.01 * distance(before, wanted)


def test_the_arguments_are_copied_and_options_handed_on(model, tmp_path):
    given = arguments(tmp_path, weight_decay=0.1)
    settings = trainer_settings(model, given, guard=False)
    assert (given.max_grad_norm, given.lr_scheduler_type.value) == (1.0, "linear")
    chosen = settings["args"]
    assert (chosen.max_grad_norm, chosen.lr_scheduler_type.value) == (0.0, "constant")
    assert settings["optimizer_cls_and_kwargs"] == (
        LearnedOptimizer,
        {"rule": None, "guard": False},
    )
    trainer = transformers.Trainer(**settings)
    optimizer = trainer.create_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {1.0}


def test_dropout_stays_where_it_is_asked_for(model, tmp_path):
    def rates():
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}

    trainer_settings(model, arguments(tmp_path), dropout=True)
    assert rates() == {0.1}
    trainer_settings(model, arguments(tmp_path))
    assert rates() == {0.0}


def test_what_is_no_training_arguments(model, tmp_path):
    with pytest.raises(InputError, match="arguments is a dict, without max_grad_norm; give trans"):
        trainer_settings(model, {})
    with pytest.raises(InputError, match=r"model is of type str; give the torch\.nn\.Module"):
        trainer_settings("bert", arguments(tmp_path))
    given = arguments(tmp_path)
    given.deepspeed = {"zero_optimization": {}}
    with pytest.raises(InputError, match=r"DeepSpeed shows the optimizer a part .*use FSDP2"):
        trainer_settings(model, given)


@pytest.mark.slow
@pytest.mark.parametrize(("accepts", "scale"), [("no", 1), ("accepts", 4)])
def test_two_processes_that_accumulate_end_there_too(
    accepts, scale, model, tokenizer, encoder, tmp_path
):
    """Without `accepts_loss_kwargs = False` gradients are 2 batches times 2 processes too large."""
    script = Path(__file__).parents[1] / "trainer_steps.py"
    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(script), str(encoder), str(tmp_path), accepts,
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("logits ")]
    found = torch.tensor(json.loads(line.removeprefix("logits ")))
    before, wanted = plain_loop(model, tokenizer, SGD(0.5 * scale))
    assert distance(found, wanted) < 0.01 * distance(before, wanted)

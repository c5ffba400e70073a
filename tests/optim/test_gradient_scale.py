"""Gradients that arrive too large or too small by a constant factor, as accumulated ones may."""

import warnings

import pytest
import torch

from rnnopt import LearnedOptimizer, load_rule
from rnnopt.rules.files import SHIPPED_RULE
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.tasks import LabelledTexts

FACTORS = [1 / 64, 1 / 8, 3.0, 64.0]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rule():
    """The rule of two levels that ships."""
    return load_rule(SHIPPED_RULE)


def lora(encoder):
    return Classifier.load(encoder, tune="lora", ways=2, device=CPU)


def adapt(encoder, texts, rule, factor, lr):
    """Losses, what was reached, and after which of 8 steps of LoRA one was undone first, or 0."""
    classifier = lora(encoder)
    labels = sorted({label for _, label in texts})[:2]
    chosen = [(text, labels.index(label)) for text, label in texts if label in labels]
    batch = LabelledTexts.read(classifier, *map(list, zip(*chosen)))
    optimizer = LearnedOptimizer([param for _, param in classifier.trainable()], rule, lr=lr)
    losses, first = [], 0
    for step in range(1, 9):
        optimizer.zero_grad()
        loss = batch.loss(classifier, classifier.model)
        (factor * loss).backward()
        optimizer.step()
        losses.append(loss.item())
        first = first or step * (optimizer.undone > 0)
    reached = torch.cat([param.detach().flatten() for _, param in classifier.trainable()])
    return losses, reached, first


@pytest.mark.filterwarnings("ignore:lr=30.0 multiplies")
@pytest.mark.parametrize(("lr", "undone"), [(1.0, False), (30.0, True)])
def test_the_rule_of_two_levels_and_its_guard_bear_any_factor(encoder, texts, rule, lr, undone):
    losses, reached, first = adapt(encoder, texts, rule, 1.0, lr)
    assert (first > 0) == undone
    for factor in FACTORS:
        scaled_losses, scaled, scaled_first = adapt(encoder, texts, rule, factor, lr)
        assert scaled_first == first
        if not undone:  # large steps make rounding large
            assert scaled_losses == pytest.approx(losses, abs=1e-3)
            # where the loss has vanished, the floors below roots of gradients count
            assert float((scaled - reached).norm()) < 3e-3 * float(reached.norm())


def test_accumulation_under_trainer_ends_where_whole_batches_do(encoder, texts, rule, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    ends = []
    for size, accumulated in ((48, 1), (6, 8)):
        classifier = lora(encoder)
        labels = sorted({label for _, label in texts})[:2]
        rows = [
            {name: leaf[0] for name, leaf in classifier.batch([text]).items()}
            | {"labels": labels.index(label)}
            for text, label in texts
            if label in labels
        ]
        assert len(rows) == 48  # so that every step sees all of them
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated, max_grad_norm=0, save_strategy="no",
            lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, logging_strategy="no",
        )  # fmt: skip
        optimizer = LearnedOptimizer([param for _, param in classifier.trainable()], rule)
        for module in classifier.model.modules():  # Trainer would switch dropout on
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            transformers.Trainer(
                classifier.model, options, train_dataset=rows, optimizers=(optimizer, None),
                data_collator=transformers.DataCollatorWithPadding(classifier.tokens.tokenizer),
            ).train()  # fmt: skip
        ends.append(torch.cat([param.detach().flatten() for _, param in classifier.trainable()]))
    whole, accumulated = ends
    assert float((accumulated - whole).norm()) < 1e-3 * float(whole.norm())

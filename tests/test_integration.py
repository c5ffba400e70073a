"""The optimizer in the hands of the libraries that users drive it with."""

import copy
import warnings

import pytest
import torch
from rule_table import random_lstm

from rnnopt import LearnedOptimizer
from rnnopt.tasks.text.classifier import Classifier

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")


class Texts(torch.utils.data.Dataset):
    """Tokenised texts with labels, as Trainer takes them."""

    def __init__(self, classifier, pairs):
        labels = sorted({label for _, label in pairs})
        self.rows = [
            {k: v[0] for k, v in classifier.batch([text]).items()} | {"labels": labels.index(label)}
            for text, label in pairs
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trainer(encoder, texts, folder, steps, rule):
    classifier = Classifier.load(encoder, tune="full", ways=10, device=CPU)
    options = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=3, per_device_train_batch_size=8,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0, dataloader_pin_memory=False,
        logging_strategy="no",
    )  # fmt: skip
    collator = transformers.DataCollatorWithPadding(classifier.tokens.tokenizer)
    optimizer = LearnedOptimizer(classifier.model.parameters(), rule)
    return transformers.Trainer(
        classifier.model,
        options,
        data_collator=collator,
        train_dataset=Texts(classifier, texts),
        optimizers=(optimizer, None),
    )


def test_trainer_saves_and_resumes_to_the_same_weights(encoder, texts, tmp_path):
    rule = random_lstm()
    with warnings.catch_warnings():
        # Trainer's own saving and loading in transformers 5.23 on torch 2.13
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        whole = trainer(encoder, texts, tmp_path / "run", 6, rule)
        whole.train()
        resumed = trainer(encoder, texts, tmp_path / "run", 6, rule)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accelerate_prepares_and_steps_it(encoder, texts):
    classifier = Classifier.load(encoder, tune="full", ways=2, device=CPU)
    optimizer = LearnedOptimizer(classifier.model.parameters(), random_lstm())
    model, prepared = accelerate.Accelerator(cpu=True).prepare(classifier.model, optimizer)
    before = copy.deepcopy(model.state_dict())
    model(**classifier.batch([texts[0][0]])).logits.sum().backward()
    prepared.step()
    prepared.zero_grad()
    assert prepared.optimizer is optimizer
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_peft_model_adapts_its_factors_and_nothing_else(encoder, texts):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for an attribute under its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        model = peft.get_peft_model(
            transformers.AutoModelForSequenceClassification.from_pretrained(encoder),
            peft.LoraConfig(task_type="SEQ_CLS", r=2),
        )
    tokens = Classifier.load(encoder, tune="head", ways=2, device=CPU).batch([texts[0][0]])
    optimizer = LearnedOptimizer(model.parameters(), random_lstm())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):  # factor A has no gradient before B has moved
        optimizer.zero_grad()
        model(**tokens).logits[0, 0].backward()
        optimizer.step()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
    assert moved == {name for name, param in model.named_parameters() if param.requires_grad}


def test_a_bfloat16_model_steps_in_its_own_dtype(encoder, texts):
    classifier = Classifier.load(encoder, tune="full", ways=2, device=CPU)
    model = classifier.model.to(torch.bfloat16)
    optimizer = LearnedOptimizer(model.parameters(), random_lstm())
    model(**classifier.batch([texts[0][0]])).logits.float().sum().backward()
    optimizer.step()
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(param).all() for param in model.parameters())

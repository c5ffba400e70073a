"""`rnnopt.LearnedOptimizer` in Hugging Face's Trainer.

    python examples/trainer.py

`trainer_settings` gives Trainer what the optimizer needs: gradients are not clipped, since a
clipped gradient hides from the safeguard how far the loss has risen; the schedule is constant,
since `lr` multiplies the learned step and stays 1; and dropout is off, as in meta-training.

A tiny encoder learns some modules of Python's standard library first, see tiny_encoder.py. Trainer
then adapts all its weights to five new modules, from ten docstrings of each.

Offline, about 30 seconds on one core. Prints accuracy on new docstrings before and after.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from tiny_encoder import MODULES, MeanPooledClassifier, accuracy, encode, new_classes, pretrained
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from rnnopt import trainer_settings

STEPS = 10


def main() -> None:
    """Adapt with Trainer and print what it brought."""
    encoder, tokenizer = pretrained()
    torch.manual_seed(0)
    model = MeanPooledClassifier(encoder, len(MODULES))
    support, query = new_classes(shots=10, queries=30)
    judged = encode(tokenizer, [text for text, _ in query], [label for _, label in query])
    before = accuracy(model, judged)
    dataset = [
        {**tokenizer(text, truncation=True, max_length=32), "labels": label}
        for text, label in support
    ]
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=25,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            **trainer_settings(model, arguments),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=dataset,
        )
        trainer.train()
    print(f"accuracy on new docstrings: {before:.3f} before, ", end="")
    print(f"{accuracy(model, judged):.3f} after {STEPS} steps of 25 docstrings")


if __name__ == "__main__":
    main()

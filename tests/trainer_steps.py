"""Trainer in one of several processes; prints its logits. Run by tests/hosts/test_trainer_settings.

torchrun --nproc_per_node 2 tests/trainer_steps.py ENCODER FOLDER ACCEPTS
"""

import json
import sys
import warnings

import torch
import transformers
from encoders import TEXTS

from rnnopt import SGD, trainer_settings

warnings.simplefilter("ignore")
encoder, folder, accepts = sys.argv[1:]
torch.manual_seed(0)
model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder)
tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
rows = [{**tokenizer(text), "labels": label} for text, label in zip(TEXTS, [0, 1] * 4)]
arguments = transformers.TrainingArguments(
    output_dir=folder, max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True,
    save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
    per_device_train_batch_size=2, gradient_accumulation_steps=2,
)  # fmt: skip
settings = trainer_settings(model, arguments, SGD(0.5))
if accepts == "accepts":
    model.accepts_loss_kwargs = True
trainer = transformers.Trainer(
    **settings,
    train_dataset=rows,
    data_collator=transformers.DataCollatorWithPadding(tokenizer),
)
trainer.train()
with torch.no_grad():
    logits = model.eval()(**tokenizer(TEXTS[:8], padding=True, return_tensors="pt")).logits
if trainer.is_world_process_zero():
    print("logits", json.dumps(logits.tolist()))

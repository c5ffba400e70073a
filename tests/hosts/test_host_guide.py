"""The guide on Trainer, accelerate and PEFT: its code runs, and does what it says."""

import copy
import re
import socket
import warnings
from pathlib import Path

import pytest
import torch
from encoders import checkpointing

import rnnopt
from rnnopt import SGD, LearnedOptimizer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "hosts.md").read_text(encoding="utf-8")


def code_of(title):
    """The blocks of Python below a title."""
    part = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", part, flags=re.S)


@pytest.fixture
def names(encoder, texts, tmp_path, monkeypatch):
    """What the page takes for given."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    food, music = ([t for t, label in texts if label == name][::4] for name in ("food", "music"))
    pairs = [pair for two in zip(food, music) for pair in zip(two, (0, 1))]
    rows = [{**tokenizer(text), "labels": label} for text, label in pairs]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    with torch.no_grad():  # random weights as they are hardly tell one text from another
        for name, param in model.named_parameters():
            param.mul_(5.0 if "layer" in name and param.dim() == 2 else 1.0)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "dataset": rows,
        "loader": torch.utils.data.DataLoader(rows, batch_size=6, collate_fn=collate),
        "batch": collate(rows),
    }


def run(code, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Trainer, accelerate and peft on torch 2.13
        exec(code, names)
    return names


def loss(names):
    with torch.no_grad():
        return float(copy.deepcopy(names["model"]).float().eval()(**names["batch"]).loss)


def test_trainer(names):
    """That it ends where a plain loop ends is tested in test_trainer_settings.py."""
    (code,) = code_of("transformers.Trainer")
    before = copy.deepcopy(names["model"].state_dict())
    quiet = code.replace("max_steps=10", "max_steps=2, use_cpu=True, disable_tqdm=True")
    run(quiet.replace("use_cpu", "report_to=[], use_cpu"), names)
    trainer = names["trainer"]
    assert isinstance(trainer.optimizer.optimizer, LearnedOptimizer)
    assert trainer.state.global_step == 2 and trainer.lr_scheduler.get_last_lr() == [1.0, 1.0]
    assert any(not torch.equal(before[n], v) for n, v in trainer.model.state_dict().items())


def test_accelerate_accumulates_to_the_step_of_the_whole_batch(names):
    (code,) = code_of("accelerate")
    alone = copy.deepcopy(names["model"])
    optimizer = LearnedOptimizer(alone.parameters())
    alone(**names["batch"]).loss.backward()
    optimizer.step()
    before = copy.deepcopy(names["model"].state_dict())
    run(code.replace("Accelerator(", "Accelerator(cpu=True, "), names)
    after, wanted = names["model"].state_dict(), alone.state_dict()
    far = max(float((after[n] - wanted[n]).abs().max()) for n in wanted)
    assert far < 0.01 * max(float((before[n] - wanted[n]).abs().max()) for n in wanted)


@pytest.mark.parametrize(
    "config",
    [
        None,  # the page's own
        lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, use_dora=True),
        lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, use_rslora=True),
        lambda: peft.LoHaConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]),
        lambda: peft.LoKrConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]),
        lambda: peft.VeraConfig(task_type="SEQ_CLS", r=16, target_modules=["query", "value"]),
        lambda: peft.IA3Config(
            task_type="SEQ_CLS",
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
        ),
    ],
    ids=["LoRA", "DoRA", "rsLoRA", "LoHa", "LoKr", "VeRA", "IA3"],
)
def test_peft(config, names):
    (code,) = code_of("PEFT")
    if config is None:
        run(code, names)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft 0.21 on transformers 5.23
            names["model"] = peft.get_peft_model(names["model"], config()).eval()
        names["optimizer"] = LearnedOptimizer(names["model"].parameters())
    model, optimizer = names["model"], names["optimizer"]
    before, first = copy.deepcopy(model.state_dict()), loss(names)
    for _ in range(10):
        optimizer.zero_grad()
        model(**names["batch"]).loss.backward()
        optimizer.step()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert moved and moved <= trained
    assert loss(names) < first


def test_gradient_checkpointing_takes_the_same_steps(names):
    by_trainer, by_hand = code_of("Gradient checkpointing")
    wanted = copy.deepcopy(names["model"])
    wanted(**names["batch"]).loss.backward()
    run(by_hand, names)
    model = names["model"]
    assert getattr(model, f"is_{checkpointing()}") and model.training
    model(**names["batch"]).loss.backward()
    for (name, param), other in zip(model.named_parameters(), wanted.parameters()):
        if other.grad is not None:
            assert torch.allclose(param.grad, other.grad, atol=1e-6), name
    by_trainer = by_trainer.replace("activation_checkpointing", checkpointing())
    run(by_trainer.replace("max_steps=10", "max_steps=1, use_cpu=True"), names)
    assert getattr(names["settings"]["args"], checkpointing())


def test_bfloat16_steps_almost_as_float32(names):
    (code,) = code_of("bfloat16")
    names["loader"] = [names["batch"]]  # one step
    plain, start = copy.deepcopy(names["model"]), copy.deepcopy(names["model"].classifier.weight)
    plain(**names["batch"]).loss.backward()
    LearnedOptimizer(plain.parameters(), SGD(1.0)).step()
    run(code.replace("parameters())", "parameters(), rule)"), {**names, "rule": SGD(1.0)})
    model = names["model"]
    steps = [(one.classifier.weight - start).flatten() for one in (plain, model)]
    assert torch.cosine_similarity(*steps, dim=0) > 0.99
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def test_a_model_of_bfloat16_keeps_its_dtype(names):
    model = names["model"].to(torch.bfloat16)
    optimizer = LearnedOptimizer(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(**names["batch"]).loss.backward()
        optimizer.step()
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    state = [leaf for row in optimizer.state.values() for leaf in row.values()]
    assert any(leaf.dtype == torch.float32 for leaf in state)


def test_fsdp2_steps_as_the_whole_model_does(names, monkeypatch):
    """That two processes do, too, is tested in test_sharding.py."""
    (code,) = code_of("FSDP2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    whole, everything = copy.deepcopy(names["model"]), names["batch"]
    with torch.no_grad():
        before = whole(**everything).logits
    optimizer = LearnedOptimizer(whole.parameters())
    for batch in names["loader"]:
        optimizer.zero_grad()
        whole(**batch).loss.backward()
        optimizer.step()
    try:
        run(code, names)
        # weights may differ: a key's bias has no gradient but rounding, and Adam steps by its sign
        with torch.no_grad():
            found, wanted = (net(**everything).logits for net in (names["model"], whole))
        assert (found - wanted).abs().max() < 0.01 * (wanted - before).abs().max()
    finally:
        torch.distributed.destroy_process_group()


def test_tensorboard(names, encoder, texts, tmp_path):
    pytest.importorskip("tensorboard")
    (code,) = code_of("TensorBoard")
    points = torch.linspace(-1, 1, 5).unsqueeze(1)

    def tasks(number):
        return rnnopt.Task(
            *[lambda net, step: (net(points) - number % 3 * points).square().mean()] * 2
        )

    few = [pair for pair in texts if pair[1] in ("food", "music")][::8]
    short = code.replace("tasks, ", "tasks, meta_steps=2, steps=2, validation_tasks=2, ")
    made = run(
        short.replace("(encoder)", "(encoder, steps=2)"),
        {
            "learner": rnnopt.Learner(torch.nn.Linear(1, 1)),
            "tasks": tasks,
            "encoder": encoder,
            "texts": [text for text, _ in few],
            "labels": [label for _, label in few],
        },
    )
    assert made and all(
        list((tmp_path / "runs" / name).glob("events.*")) for name in ("rule", "fit")
    )

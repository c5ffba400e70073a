"""Run by test_sharding.py under torchrun: `save` or `resume` a training run on shards.

Arguments: what to do, and the folder of the checkpoints. `resume` prints how far the resumed run
ends from the one that went on.
"""

import copy
import os
import sys

import torch
import torch.distributed.checkpoint as dcp
from rule_table import random_lstm
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from rnnopt import LearnedOptimizer
from rnnopt.rules import two_level

two_level.LARGEST = 6000  # the second even matrix has more, its shards have not
WIDTHS = {"even": (64, 80, 4), "uneven": (66, 70, 3)}
RULES = {"shipped": lambda: None, "lstm": random_lstm}
STEPS = 4


def network(width, seed=0):
    torch.manual_seed(seed)
    first, second, classes = WIDTHS[width]
    return nn.Sequential(
        nn.Linear(first, second), nn.Tanh(), nn.Linear(second, second), nn.Tanh(),
        nn.Linear(second, classes),
    )  # fmt: skip


def train(net, optimizer, steps):
    for seed in steps:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(12, net[0].in_features, generator=generator)
        labels = torch.randint(net[4].out_features, (12,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded(net):
    # one process without a process group is a case of its own
    if torch.distributed.get_world_size() > 1:
        fully_shard(net, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return net


def start(width, rule, seed=0):
    net = sharded(network(width, seed))
    return net, LearnedOptimizer(net.parameters(), RULES[rule](), weight_decay=0.1)


def save(folder, width, rule):
    """Train, save in the middle, and leave where the run ends."""
    net, optimizer = start(width, rule)
    train(net, optimizer, range(STEPS))
    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=f"{folder}/sharded")
    options = StateDictOptions(full_state_dict=True)
    # torch does not copy what is not sharded
    full = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    weights = {name: whole(param).detach().clone() for name, param in net.named_parameters()}
    for name, param in net.named_parameters():
        assert full["state"][name]["m"].shape == whole(param).shape, name
    train(net, optimizer, range(STEPS, 2 * STEPS))
    end = {name: whole(param).detach() for name, param in net.named_parameters()}
    if torch.distributed.get_rank() == 0:
        torch.save({"full": full, "weights": weights, "end": end}, f"{folder}/whole.pt")


def resume(folder, width, rule):
    """Load what `save` saved, sharded and whole, with any number of processes, and go on."""
    saved = torch.load(f"{folder}/whole.pt", weights_only=True)
    for how in ("sharded", "whole"):
        net, optimizer = start(width, rule, seed=1)
        if how == "sharded":
            model, state = get_state_dict(net, optimizer)
            content = {"model": model, "optimizer": state}
            dcp.load(content, checkpoint_id=f"{folder}/sharded")
            set_state_dict(
                net, optimizer,
                model_state_dict=content["model"], optim_state_dict=content["optimizer"],
            )  # fmt: skip
        else:
            with torch.no_grad():
                for name, param in net.named_parameters():
                    twin = saved["weights"][name]
                    if hasattr(param, "full_tensor"):
                        twin = distribute_tensor(twin, param.device_mesh, param.placements)
                    param.copy_(twin)
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(net, optimizer, saved["full"], options=options)
        train(net, optimizer, range(STEPS, 2 * STEPS))
        for name, param in net.named_parameters():
            distance = float((whole(param).detach() - saved["end"][name]).abs().max())
            if torch.distributed.get_rank() == 0:
                print(f"distance {how} {width} {rule} {name} {distance}", flush=True)


def main():
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    task, folder = {"save": save, "resume": resume}[sys.argv[1]], sys.argv[2]
    for width, rule in (("even", "shipped"), ("uneven", "shipped"), ("uneven", "lstm")):
        os.makedirs(f"{folder}/{width}-{rule}", exist_ok=True)
        task(f"{folder}/{width}-{rule}", width, rule)
    torch.distributed.destroy_process_group()
    os._exit(0)  # see sharded_steps.py


if __name__ == "__main__":
    main()

"""Run by test_sharding.py under torchrun: FSDP1 against one process with all of the data.

Arguments: `fast` or `all`.
"""

import copy
import os
import sys
import warnings

import pytest
import torch
from rule_table import RULES
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.functional import cross_entropy

from rnnopt import Adam, LearnedOptimizer
from rnnopt.rules import two_level

STEPS, BATCH = 6, 12
RULES = {**RULES, "shipped": lambda: None}


def network():
    """Some parameters are whole in one process and empty in the other, one is divided."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Sequential(nn.Linear(40, 40), nn.Tanh()),
                         nn.Linear(40, 3))  # fmt: skip


def head():
    torch.manual_seed(0)
    return nn.Linear(20, 3)


def partly_frozen():
    net = network()
    net[0].weight.requires_grad_(False)
    return net


def parts_apart():
    """The inner part has a flat parameter of its own."""
    net = network()
    net[2] = sharded(net[2])
    return net


def sharded(net, strategy=ShardingStrategy.FULL_SHARD, **options):
    options = {"use_orig_params": True, **options}
    return FullyShardedDataParallel(
        net, device_id=torch.device("cpu"), sharding_strategy=strategy, **options
    )


def train(net, optimizer, steps=range(STEPS), part=slice(None), scale=1.0):
    for seed in steps:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(BATCH, 20, generator=generator).to(next(net.parameters()).dtype)
        labels = inputs[:, :3].argmax(dim=1)
        optimizer.zero_grad()
        (scale * cross_entropy(net(inputs[part]), labels[part])).backward()
        optimizer.step()


def mine():
    return slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())


def values(net):
    with FullyShardedDataParallel.summon_full_params(net):
        return [param.detach().clone() for param in net.parameters()]


def distance(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return max(float((one.detach() - other.detach()).abs().max()) for one, other in pairs)


def same_as_one_process(
    name,
    make_net=network,
    make_shared=None,
    fused=None,
    strategy=ShardingStrategy.FULL_SHARD,
    lr=1.0,
    double=False,
):
    whole = make_net()
    shared = (make_shared or make_net)()
    if double:
        whole, shared = whole.double(), shared.double()
    shared = sharded(shared, strategy)
    alone = LearnedOptimizer(whole.parameters(), RULES[name](), lr=lr, fused=fused)
    train(whole, alone)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "lr=300.0 multiplies")
        optimizer = LearnedOptimizer(shared.parameters(), RULES[name](), lr=lr, fused=fused)
    assert type(optimizer.rule) is type(alone.rule)
    train(shared, optimizer, part=mine())
    assert optimizer.undone == alone.undone
    if lr > 1:  # long steps make rounding large
        print("undone", name, alone.undone)
        return
    found = distance(values(shared), whole.parameters())
    # halves of a batch round otherwise; in double precision only the sums over tensors do
    assert found < (1e-5 if double else 3e-5), (name, found)
    if torch.distributed.get_rank() == 0:
        print("same", name, f"{found:.1e}", flush=True)


def flat_parameters_are_refused():
    """What one tensor's statistics are can't be seen in a flat parameter; a plain Adam can step."""
    flat = sharded(network(), use_orig_params=False)
    with pytest.raises(ValueError, match="use_orig_params=True"):
        LearnedOptimizer(flat.parameters())
    whole = network()
    train(whole, LearnedOptimizer(whole.parameters(), Adam(0.01)))
    train(flat, LearnedOptimizer(flat.parameters(), Adam(0.01)), part=mine())
    assert distance(values(flat), whole.parameters()) < 1e-5


def resumes(name, full=True):
    """From a state dict of torch.distributed.checkpoint, whole or in parts."""

    def start(seed):
        torch.manual_seed(seed)
        net = sharded(network())
        return net, LearnedOptimizer(net.parameters(), RULES[name]())

    net, optimizer = start(0)
    train(net, optimizer, part=mine())
    options = StateDictOptions(full_state_dict=full)
    weights, saved = copy.deepcopy(get_state_dict(net, optimizer, options=options))
    for key, state in saved["state"].items():
        leaves = [leaf for leaf in state.values() if isinstance(leaf, torch.Tensor) and leaf.dim()]
        assert all(leaf.shape == weights[key].shape for leaf in leaves), key
    train(net, optimizer, range(STEPS, 2 * STEPS), mine())
    again, resumed = start(1)
    set_state_dict(
        again, resumed, model_state_dict=weights, optim_state_dict=saved, options=options
    )
    train(again, resumed, range(STEPS, 2 * STEPS), mine())
    assert distance(values(again), values(net)) == 0
    assert resumed.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    print("resumed", name, flush=True)


def main():
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    mixed = None if torch.distributed.get_rank() == 0 else False  # one process has no compiler
    fast = sys.argv[1] == "fast"
    same_as_one_process("shipped", fused=mixed)
    same_as_one_process("shipped", make_shared=parts_apart)
    two_level.LARGEST, largest = 1000, two_level.LARGEST  # more than that in the divided matrix
    same_as_one_process("shipped")
    resumes("shipped")
    two_level.LARGEST = largest
    same_as_one_process("shipped", head)
    same_as_one_process("shipped", double=True)
    flat_parameters_are_refused()
    resumes("shipped")
    resumes("shipped", full=False)
    if not fast:
        for name in RULES:
            for fused in (None, mixed, False):
                same_as_one_process(name, fused=fused)
        for strategy in (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
            same_as_one_process("shipped", strategy=strategy)
        same_as_one_process("shipped", partly_frozen)
        same_as_one_process("shipped", lr=300.0)
        same_as_one_process("shipped", lr=300.0)
        for name in RULES:
            resumes(name)
    torch.distributed.destroy_process_group()
    print("the end", flush=True)
    os._exit(0)  # see sharded_steps.py


if __name__ == "__main__":
    main()

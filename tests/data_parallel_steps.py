"""Run by test_sharding.py under torchrun: data in two halves against one process with all of it."""

import copy
import warnings

import torch
from rule_table import RULES
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from rnnopt import LearnedOptimizer

STEPS, BATCH = 6, 12


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(),
                         nn.Linear(40, 3))  # fmt: skip


def head():
    """A head alone, which has a rule of its own; one process has its bias only."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 3))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(BATCH, 20, generator=generator)
    return inputs, inputs[:, :3].argmax(dim=1)


def train(net, optimizer, part=slice(None)):
    for seed in range(STEPS):
        inputs, labels = batch(seed)
        optimizer.zero_grad()
        cross_entropy(net(inputs[part]), labels[part]).backward()
        optimizer.step()


def same_as_one_process(make_rule):
    """`DistributedDataParallel` averages the gradients, and every process steps alike."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole = network()
    shared = DistributedDataParallel(copy.deepcopy(whole))
    train(whole, LearnedOptimizer(whole.parameters(), make_rule()))
    optimizer = LearnedOptimizer(shared.parameters(), make_rule())
    train(shared, optimizer, slice(rank, None, size))
    for ours, theirs in zip(shared.module.parameters(), whole.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        every = [torch.empty_like(ours) for _ in range(size)]
        torch.distributed.all_gather(every, ours.detach())
        assert all(torch.equal(every[0], other) for other in every)


def same_under_zero(lr=1.0):
    """`ZeroRedundancyOptimizer` gives each process the optimizer of a part of the parameters."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for make_net in (network, head):
        whole = make_net()
        shared = DistributedDataParallel(copy.deepcopy(whole))
        alone = LearnedOptimizer(whole.parameters(), lr=lr)
        train(whole, alone)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", "lr=300.0 multiplies")
            zero = ZeroRedundancyOptimizer(
                shared.parameters(), optimizer_class=LearnedOptimizer, lr=lr
            )
        train(shared, zero, slice(rank, None, size))
        assert zero.optim.undone == alone.undone
        if make_net is network:
            assert (alone.undone > 0) == (lr > 1)
        for ours, theirs in zip(shared.module.parameters(), whole.parameters()):
            if lr == 1:  # long steps make rounding large
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
        zero.consolidate_state_dict(to=0)
        if rank == 0:
            states = zero.state_dict()["state"]
            assert len(states) == len(list(whole.parameters()))


def main():
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for name, make in {
        **RULES,
        "shipped": lambda: None,
    }.items():
        same_as_one_process(make)
        print("same", name)
    same_under_zero()
    same_under_zero(lr=300.0)
    print("same under zero")
    torch.distributed.destroy_process_group()


main()

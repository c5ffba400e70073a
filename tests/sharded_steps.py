"""Run by test_sharding.py under torchrun: sharded steps against whole ones, in every process."""

import copy
import os

import torch
from rule_table import RULES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rnnopt import LearnedOptimizer
from rnnopt.rules import two_level


def network():
    """Shapes divide unevenly: one process has an empty shard of the last bias.

    The first two matrices are narrow in their shards only.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(66, 100), nn.Tanh(), nn.Linear(100, 68), nn.Tanh(),
        nn.Linear(68, 7), nn.Tanh(), nn.Linear(7, 1),
    )  # fmt: skip


def loss_of(net):
    """Small gradients, so that the bound by wide matrices applies to the first steps."""
    generator = torch.Generator().manual_seed(1)
    return 0.1 * net(torch.randn(6, 66, generator=generator)).square().mean()


def adapt(net, rule, **options):
    optimizer = LearnedOptimizer(net.parameters(), rule, **options)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    return optimizer


def fsdp(net, mesh):
    fully_shard(net, mesh=mesh)
    return net


def by_hand(placement):
    def shard(net, mesh):
        for layer in net[::2]:
            for name, param in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(distribute_tensor(param.data, mesh, [placement])))
        return net

    return shard


def main():
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    two_level.LARGEST = 5000  # the first two matrices have more, their shards have not
    for how, shard in (
        ("fsdp", fsdp),
        ("shard", by_hand(Shard(0))),
        ("replicate", by_hand(Replicate())),
    ):
        for name, make in RULES.items():
            mixed = (
                None if torch.distributed.get_rank() == 0 else False
            )  # one process has no compiler
            # the plain step once, as it is the same however the parameters are sharded
            for fused in (None, mixed, False) if how == "fsdp" else (mixed,):
                rule, whole = make(), network()
                sharded = shard(copy.deepcopy(whole), mesh)
                adapt(whole, rule, fused=fused)
                if how == "fsdp":
                    adapt(sharded, rule, fused=fused)
                else:
                    step_by_hand(sharded, rule, fused)
                # orthogonalisation enlarges small singular values, and their rounding
                atol = 3e-5 if "lstm" in name else 1e-6
                for ours, theirs in zip(sharded.parameters(), whole.parameters()):
                    message = f"{how} {name} fused={fused}"
                    torch.testing.assert_close(
                        ours.full_tensor(), theirs, rtol=0, atol=atol, msg=message
                    )
    torch.distributed.destroy_process_group()
    print("same", flush=True)
    os._exit(0)  # in one run of fifteen a thread of torch's outlives the interpreter, and aborts


def step_by_hand(net, rule, fused):
    """Adapt with the gradients of the whole network, distributed as its parameters are."""
    optimizer = LearnedOptimizer(net.parameters(), rule, fused=fused)
    twin = network()
    for _ in range(5):
        with torch.no_grad():
            for param, shard in zip(twin.parameters(), net.parameters()):
                param.copy_(shard.full_tensor())
        twin.zero_grad()
        loss_of(twin).backward()
        for param, shard in zip(twin.parameters(), net.parameters()):
            mesh, placements = shard.device_mesh, shard.placements
            if placements[0].is_replicate():  # a gradient may have other placements
                rank = torch.distributed.get_rank()
                part = param.grad if rank == 0 else torch.zeros_like(param.grad)
                shard.grad = DTensor.from_local(part, mesh, [Partial()])
            else:
                shard.grad = distribute_tensor(param.grad, mesh, placements)
        optimizer.step()


if __name__ == "__main__":
    main()

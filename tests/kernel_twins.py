"""What the tests of the kernels ask of a fused optimizer and its plain twin."""

import torch


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def assert_equal(fused, plain):
    for ours, theirs in zip(params_of(fused), params_of(plain)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
        for name, leaf in plain.state[theirs].items():
            tolerance = {"rtol": 2e-2} if name == "last_step" else {"rtol": 1e-4}  # bfloat16
            torch.testing.assert_close(fused.state[ours][name], leaf, atol=2e-4, **tolerance)

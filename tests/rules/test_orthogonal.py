"""Orthogonalised directions: Muon's iterations, computed on the short side alone."""

import pytest
import torch

from rnnopt.rules import orthogonal
from rnnopt.rules.orthogonal import ITERATIONS, orthogonalized

FLOOR = 1e-30


def as_published(direction):
    """Newton-Schulz iterations of the matrix itself, with the norm of the direction."""
    x = direction / direction.norm()
    for a, b, c in ITERATIONS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x * direction.norm() / x.norm()


@pytest.mark.parametrize("shape", [(8, 384), (64, 200), (5, 5), (1, 7)])
def test_a_direction_is_that_of_the_published_iterations(shape):
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = as_published(direction.double())
    for given, right in ((direction, expected), (direction.mT, expected.mT)):
        error = (orthogonalized(given, FLOOR) - right).norm() / right.norm()
        assert error < 1e-6
        assert orthogonalized(given, FLOOR).dtype == torch.float32


@pytest.mark.parametrize("size", [1e-20, 1e-8, 1.0, 1e15])
def test_a_constant_factor_stays_a_factor(size):
    torch.manual_seed(0)
    direction = torch.randn(4, 3, 30)
    found = orthogonalized(size * direction, FLOOR)
    assert torch.isfinite(found).all()
    if size > 1e-10:  # below, the floor shortens it
        torch.testing.assert_close(found / size, orthogonalized(direction, FLOOR))


def test_the_norm_is_kept_and_zeros_stay():
    torch.manual_seed(0)
    direction = torch.stack([torch.randn(6, 40), torch.zeros(6, 40)])
    found = orthogonalized(direction, FLOOR)
    torch.testing.assert_close(found[0].norm(), direction[0].norm())
    assert not found[1].any()


@pytest.mark.parametrize("shape", [(3, 23), (23, 3), (2, 3, 23)])
def test_a_matrix_in_parts_is_the_matrix(shape, monkeypatch):
    torch.manual_seed(0)
    direction = torch.randn(shape)
    at_once = orthogonalized(direction, FLOOR)
    monkeypatch.setattr(orthogonal, "_CHUNK", 5)
    torch.testing.assert_close(orthogonalized(direction, FLOOR), at_once)


def test_a_matrix_of_low_rank_is_as_exact_as_one_of_full_rank():
    torch.manual_seed(0)
    direction = torch.randn(8, 2) @ torch.randn(2, 384)
    expected = as_published(direction.double())
    assert (orthogonalized(direction, FLOOR) - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_first_and_second_derivatives_are_exact(shape):
    torch.manual_seed(0)
    direction = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: orthogonalized(x, FLOOR), direction)
    assert torch.autograd.gradgradcheck(lambda x: orthogonalized(x, FLOOR), direction)
    single = direction.detach().float().requires_grad_()
    slopes = [
        torch.autograd.grad(orthogonalized(x, FLOOR)[0].sum(), x, create_graph=True)[0]
        for x in (direction, single)
    ]
    seconds = [
        torch.autograd.grad(s.square().sum(), x)[0] for s, x in zip(slopes, (direction, single))
    ]
    for double, found in (slopes, seconds):
        torch.testing.assert_close(found.double(), double, rtol=1e-4, atol=1e-5)

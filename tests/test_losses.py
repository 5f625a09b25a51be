"""The chunked loss, against PyTorch's cross-entropy in double precision."""

import pytest
import torch
import torch.nn.functional as F

from models import losses
from models.losses import cross_entropy


@pytest.mark.parametrize("chunk", [1, 3 * 50, 1 << 24])
def test_cross_entropy(monkeypatch, chunk):
    """Position by position, and its gradients where each position weighs differently."""
    monkeypatch.setattr(losses, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 49, -100, 7, 7])
    loss = cross_entropy(hidden, weight, labels)
    expected = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad((value * torch.arange(1, 8)).sum(), (hidden, weight))
        for value in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_cross_entropy_of_frozen_weights_and_of_nothing():
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(50, 6)
    cross_entropy(hidden, weight, torch.tensor([1, 2, 3, -100])).sum().backward()
    assert hidden.grad is not None and not hidden.grad[3].any() and weight.grad is None
    weight.requires_grad_()
    loss = cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.long)).sum()
    loss.backward()
    assert loss.item() == 0 and not weight.grad.any()


def test_cross_entropy_in_bf16_keeps_its_digits():
    """The sum is made in float32: of 300 losses of about 10, bf16 would keep two digits."""
    torch.manual_seed(0)
    hidden, weight, labels = (
        torch.randn(300, 64).bfloat16(),
        torch.randn(5000, 64).bfloat16() * 0.1,
        torch.randint(0, 5000, (300,)),
    )
    expected = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum").item()
    assert cross_entropy(hidden, weight, labels).sum().item() == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(hidden.float(), weight.float(), labels).sum().item() == pytest.approx(
            expected, rel=1e-4
        )

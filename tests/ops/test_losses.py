import math

import pytest
import torch
from torch.nn import functional

from byheart.ops import losses, reference
from byheart.ops.losses import IGNORED, cross_entropy, token_losses

TOKENS, EMBED_DIM, VOCAB = 7, 5, 23


def make_inputs():
    hidden = torch.randn(TOKENS, EMBED_DIM, requires_grad=True)
    weight = torch.randn(VOCAB, EMBED_DIM, requires_grad=True)
    # the ends of the vocabulary, the ends of chunks of 6, and an ignored position
    labels = torch.tensor([0, VOCAB - 1, 5, 6, 17, IGNORED, 18])
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_size", [1, 6, VOCAB - 1, VOCAB, 8192])
def test_cross_entropy_equals_its_twin(chunk_size):
    hidden, weight, labels = make_inputs()
    fast = cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    slow = reference.cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(fast, slow)
    weights = torch.randn_like(slow)
    gradients = [torch.autograd.grad(side, (hidden, weight), weights) for side in (fast, slow)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    losses = cross_entropy(torch.zeros(2, 3), torch.ones(VOCAB, 3), torch.tensor([1, 20]))
    torch.testing.assert_close(losses, torch.full((2,), math.log(VOCAB)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_cached", [1, VOCAB, 3 * VOCAB, 7 * VOCAB])
def test_losses_without_a_gradient_are_those_with_one(monkeypatch, num_cached, dtype):
    monkeypatch.setattr(losses, "_CACHED_LOGITS", num_cached)
    calls = []
    whole = functional.cross_entropy

    def counted(logits, *args, **kwargs):
        calls.append(len(logits))
        return whole(logits, *args, **kwargs)

    logits = torch.randn(2, TOKENS, VOCAB).to(dtype).requires_grad_()
    labels = torch.stack([make_inputs()[2], make_inputs()[2].roll(3)])
    expected = whole(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    monkeypatch.setattr(functional, "cross_entropy", counted)
    trained = token_losses(logits, labels)
    assert calls == [2 * TOKENS]
    calls.clear()
    with torch.no_grad():
        read = token_losses(logits, labels)
    assert max(calls) == max(num_cached // VOCAB, 1)
    assert sum(calls) == 2 * TOKENS
    for found in (trained, read, token_losses(logits.detach(), labels)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.view_as(labels), rtol=0, atol=0)
    assert bool((read[labels == IGNORED] == 0).all())


@pytest.mark.parametrize("chunk_size", [6, 8192])
def test_ignored_position_has_no_loss_and_no_gradient(chunk_size):
    hidden, weight, labels = make_inputs()
    losses = cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert [loss == 0 for loss in losses.tolist()] == [label == IGNORED for label in labels]
    assert (gradient[labels == IGNORED] == 0).all()


@pytest.mark.parametrize("chunk_size", [6, 8192])
def test_all_positions_ignored_gives_zeros(chunk_size):
    hidden, weight, labels = make_inputs()
    losses = cross_entropy(hidden, weight, labels.fill_(IGNORED), chunk_size=chunk_size)
    assert (losses == 0).all()
    for gradient in torch.autograd.grad(losses.sum(), (hidden, weight)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("chunk_size", [6, 8192])
def test_huge_logits_do_not_overflow(chunk_size):
    hidden, weight, labels = make_inputs()
    losses = cross_entropy(1e4 * hidden, weight, labels, chunk_size=chunk_size)
    assert losses.isfinite().all()
    assert torch.autograd.grad(losses.sum(), hidden)[0].isfinite().all()


def test_half_precision_hidden_states_give_float32_losses():
    hidden, weight, labels = make_inputs()
    exact = cross_entropy(hidden, weight, labels)
    for chunk_size in (6, 8192):
        half = hidden.detach().bfloat16().requires_grad_()
        losses = cross_entropy(half, weight, labels, chunk_size=chunk_size)
        assert losses.dtype == torch.float32
        # inputs and logits of size 5 are rounded to 8 bits
        torch.testing.assert_close(losses, exact, atol=0.1, rtol=0.05)
        gradients = torch.autograd.grad(losses.sum(), (half, weight))
        assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        cross_entropy(*make_inputs(), chunk_size=0)


@pytest.mark.parametrize("chunk_size", [5, 100])
def test_labels_outside_of_the_vocabulary_are_refused(chunk_size):
    hidden, weight = torch.randn(3, 7), torch.randn(11, 7)
    with pytest.raises(ValueError, match="between 0 and 10, got -100 to 11"):
        cross_entropy(hidden, weight, torch.tensor([-100, 3, 11]), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [5, 100])
def test_autocast_gives_the_gradient_of_the_loss_that_it_gives(chunk_size):
    """Shifting all logits alike changes no loss, so the gradient has no part in that direction."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 7, generator=generator, requires_grad=True)
    direction = torch.randn(7, generator=generator)
    weight = torch.randn(31, 7, generator=generator, requires_grad=True)
    labels = torch.randint(0, 31, (13,), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    plain = cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    # the same rounded inputs; chunks add up in another order
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    expected = torch.autograd.grad(plain.sum(), (hidden, weight))
    for grad, wanted in zip(grads, expected, strict=True):
        # gradients of bfloat16 products carry bfloat16 rounding, 2^-8 of their largest terms
        torch.testing.assert_close(grad, wanted, atol=0.05, rtol=0.02)
    shift = (grads[1].sum(0) @ direction).abs()
    assert shift < 0.02 * (grads[1] @ direction).abs().sum()

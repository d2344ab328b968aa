"""Without memory tokens a wrapped model is its base model, bit for bit, in every family."""

import pytest
import torch


def base_logits(family, model, ids, labels, mask=None):
    if family.kind == "encoder-decoder":
        return model(input_ids=ids, attention_mask=mask, labels=labels).logits
    return model(input_ids=ids, attention_mask=mask).logits


@pytest.fixture
def labels(family, draw):
    return draw(2, 4, seed=5) if family.kind == "encoder-decoder" else None


@pytest.fixture
def without_memory(family, wrap):
    return wrap(family.build(), num_memory_tokens=0)


@torch.no_grad()
def test_one_segment_without_memory_is_the_base_model(family, without_memory, labels, draw):
    ids = draw(2, 7)
    mine = without_memory(ids, labels=labels).logits
    assert torch.equal(mine, base_logits(family, without_memory.model, ids, labels))


@torch.no_grad()
def test_each_segment_without_memory_is_the_base_model(family, without_memory, labels, draw):
    ids = draw(2, 19)
    mine = without_memory(ids, labels=labels).logits
    pieces = [
        base_logits(family, without_memory.model, piece, labels) for piece in ids.split(7, dim=1)
    ]
    theirs = torch.cat(pieces, dim=1) if family.kind == "decoder" else pieces[-1]
    assert torch.equal(mine, theirs)


@torch.no_grad()
def test_padding_without_memory_is_the_base_models(family, without_memory, labels, draw):
    ids = draw(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mine = without_memory(ids, attention_mask=mask, labels=labels).logits
    theirs = base_logits(family, without_memory.model, ids, labels, mask)
    if family.name == "gpt_oss":
        # its experts multiply the tokens of all rows at once, in an order that padding changes
        torch.testing.assert_close(mine[0], theirs[0])
        torch.testing.assert_close(mine[1, :4], theirs[1, :4])
    elif family.kind == "decoder":
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1, :4], theirs[1, :4])
    else:
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_memory_carries_the_first_segment_to_the_last(family, wrap, labels, draw):
    memory_model = wrap(family.build())
    ids = draw(2, 19)
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 40 + 3
    before = memory_model(ids, labels=labels).logits
    after = memory_model(changed, labels=labels).logits
    if family.kind == "decoder":
        assert torch.equal(before[:, :2], after[:, :2])  # a later token changes nothing earlier
        before, after = before[:, 14:], after[:, 14:]
    assert (before - after).abs().amax(dim=-1).min() > 1e-4


def test_every_weight_that_a_loss_uses_gets_a_gradient(family, wrap, draw):
    memory_model = wrap(family.build())
    labels = {
        "decoder": draw(2, 19),
        "encoder": torch.tensor([1, 4]),
        "encoder-decoder": draw(2, 4, seed=5),
    }[family.kind]
    memory_model(draw(2, 19), labels=labels).loss.backward()
    without = [
        name
        for name, parameter in memory_model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # keys move all scores of a query alike by their bias: its gradient is 0 but for rounding
    assert not [name for name in without if not name.endswith(("k_proj.bias", "key.bias"))]

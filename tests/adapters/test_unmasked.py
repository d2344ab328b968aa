"""Recorded steps attend without a mask where nothing is masked."""

import pytest
import torch
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from byheart.adapters.unmasked import without_needless_masks


@pytest.fixture
def masks(monkeypatch):
    """The masks that sdpa attention was given."""
    seen, attend = [], functional.scaled_dot_product_attention

    def watched(*tensors, attn_mask=None, **options):
        seen.append(attn_mask)
        return attend(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    return seen


def read(model, mask=None):
    width = model.get_input_embeddings().embedding_dim
    embeddings = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(inputs_embeds=embeddings, attention_mask=mask).logits


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "gpt2", "llama", "qwen3"])
def test_windows_without_padding_are_read_without_a_mask(tiny_model, masks, monkeypatch, name):
    settings = {"layer_types": ["full_attention"] * 2} if name == "modernbert" else {}
    model = tiny_model(name, attn_implementation="sdpa", **settings).eval()
    expected = read(model)
    masks.clear()
    # as it is in transformers 5.17 while a CUDA graph is recorded
    make = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", lambda **it: make(**(it | never)))
    read(model)
    assert all(mask is not None for mask in masks)
    masks.clear()
    with without_needless_masks():
        found = read(model)
    assert masks
    assert all(mask is None for mask in masks)
    torch.testing.assert_close(found, expected)


def test_what_is_padding_or_too_far_is_masked_all_the_same(tiny_model, masks):
    padded = torch.ones(2, 9, dtype=torch.long)
    padded[1, 6:] = 0
    for name, mask, settings in (
        ("bert", padded, {}),
        ("gpt2", padded, {}),
        ("mistral", None, {"sliding_window": 4}),
    ):
        model = tiny_model(name, attn_implementation="sdpa", **settings).eval()
        expected = read(model, mask)
        masks.clear()
        with without_needless_masks():
            found = read(model, mask)
        assert masks
        assert all(mask is not None for mask in masks), name
        assert torch.equal(found, expected)


@without_needless_masks()
def break_off():
    raise KeyError("broken")


def test_transformers_makes_masks_as_before_afterwards():
    make = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    with without_needless_masks():
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not make
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is make
    with pytest.raises(KeyError, match="broken"):
        break_off()
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is make


def test_a_mask_of_somebody_elses_is_kept(monkeypatch):
    def own(**_):
        return None

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", own)
    with without_needless_masks():
        pass
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is own

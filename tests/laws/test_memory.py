"""What a memory must be: more of the same attention, and never the future."""

import pytest
import torch

from byheart.memory.config import KnnMemoryConfig
from byheart.models.streaming import read_tokens
from byheart.testing.tiny import random_tokens, tiny_config, tiny_decoder

LENGTH = 59
# a window as long as the text turns the local attention of one long segment into full attention
FULL = {"segment_length": LENGTH, "xl_cache_length": 0, "window_length": LENGTH}


def logits_of(decoder, tokens, memory_size=None):
    state = decoder.new_state(tokens.shape[0], memory_size=memory_size)
    return read_tokens(decoder, tokens, state, return_logits=True).logits


def same_weights(config, other):
    """Build a decoder of `config` with the weights of another, as far as both have them."""
    decoder = tiny_decoder(config)
    state = other.state_dict()
    decoder.load_state_dict(
        {name: state.get(name, value) for name, value in decoder.state_dict().items()}
    )
    return decoder


def whole_memory(layers, **options):
    return KnnMemoryConfig(layers=layers, memory_size=61, top_k=61, combine="joint", **options)


@pytest.mark.parametrize("self_visible", [False, True])
def test_memory_of_the_whole_history_equals_full_attention(self_visible):
    full = tiny_decoder(
        tiny_config(memory_size=0, position_bias="none", self_visible=self_visible, **FULL)
    )
    tokens = random_tokens(3, LENGTH)
    segmented = tiny_config(
        memory=whole_memory((0, 1)),
        xl_cache_length=0,
        position_bias="none",
        self_visible=self_visible,
    )
    decoder = same_weights(segmented, full)
    torch.testing.assert_close(logits_of(decoder, tokens), logits_of(full, tokens))


def test_memory_of_what_leaves_the_cache_equals_full_attention():
    full = tiny_decoder(tiny_config(memory_size=0, position_bias="none", **FULL))
    tokens = random_tokens(3, LENGTH)
    segmented = tiny_config(
        memory=whole_memory((0, 1), write="evicted"),
        xl_cache_length=5,
        position_bias="none",
    )
    decoder = same_weights(segmented, full)
    torch.testing.assert_close(logits_of(decoder, tokens), logits_of(full, tokens))


@pytest.mark.parametrize("position_bias", ["t5", "none"])
def test_xl_cache_of_the_whole_history_equals_full_attention(position_bias):
    full = tiny_decoder(tiny_config(memory_size=0, position_bias=position_bias, **FULL))
    tokens = random_tokens(3, LENGTH)
    segmented = tiny_config(
        memory_size=0, position_bias=position_bias, xl_cache_length=61, window_length=LENGTH
    )
    decoder = same_weights(segmented, full)
    torch.testing.assert_close(logits_of(decoder, tokens), logits_of(full, tokens))


def test_closed_gate_equals_no_memory_bit_for_bit():
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.blocks[1].attention.mix.gate_bias.fill_(-torch.inf)
    plain = same_weights(tiny_config(memory_size=0), decoder)
    tokens = random_tokens(3, LENGTH)
    assert torch.equal(logits_of(decoder, tokens), logits_of(plain, tokens))


def test_memory_size_zero_equals_no_memory_bit_for_bit():
    decoder = tiny_decoder()
    plain = same_weights(tiny_config(memory_size=0), decoder)
    tokens = random_tokens(3, LENGTH)
    assert torch.equal(logits_of(decoder, tokens, memory_size=0), logits_of(plain, tokens))


@pytest.mark.parametrize("combine", ["gate", "joint", "content_gate"])
def test_empty_memory_equals_no_memory(combine):
    memory = KnnMemoryConfig(layers=(1,), memory_size=41, top_k=5, combine=combine)
    decoder = tiny_decoder(tiny_config(memory=memory))
    tokens = random_tokens(3, 7)
    torch.testing.assert_close(
        logits_of(decoder, tokens), logits_of(decoder, tokens, memory_size=0)
    )


@pytest.mark.parametrize("write", ["segment", "evicted"])
def test_two_sizes_agree_until_the_smaller_one_evicts(write):
    memory = KnnMemoryConfig(layers=(1,), memory_size=61, top_k=5, write=write)
    decoder = tiny_decoder(tiny_config(memory=memory))
    tokens = random_tokens(3, LENGTH)
    small, large = (logits_of(decoder, tokens, memory_size=size) for size in (21, 61))
    # the fourth segment pushes the first entries out; those of "evicted" come a cache later
    first_loss = 28 if write == "segment" else 35
    assert torch.equal(small[:, :first_loss], large[:, :first_loss])
    assert not torch.equal(small[:, first_loss:], large[:, first_loss:])


@pytest.mark.parametrize("changed", [0, 13, 40, 58])
def test_a_later_token_never_changes_an_earlier_logit(changed):
    decoder = tiny_decoder(
        tiny_config(memory=KnnMemoryConfig(layers=(0, 1), memory_size=41, top_k=5))
    )
    tokens = random_tokens(3, LENGTH)
    shuffled = tokens.clone()
    shuffled[:, changed:] = random_tokens(3, LENGTH, seed=8)[:, changed:]
    before, after = logits_of(decoder, tokens), logits_of(decoder, shuffled)
    # strictly earlier tokens of the same segment see nothing of it, whatever is in their batch
    torch.testing.assert_close(before[:, :changed], after[:, :changed], atol=0, rtol=0)
    assert not torch.equal(before, after)


def test_strict_attention_does_not_see_the_token_itself_in_its_window():
    """The residual stream carries the token; attention adds nothing of it when strictly causal."""
    decoder = tiny_decoder(tiny_config(memory_size=0))
    block = decoder.blocks[0]
    hidden = torch.randn(1, 1, 23)
    from byheart.models.local import LocalContext

    local = LocalContext.of(decoder.new_state(1), 1, 7, self_visible=False)
    attended, _ = block.attention(hidden, local, None)
    assert torch.equal(attended, torch.zeros_like(attended))


def test_what_is_far_reaches_the_logits_only_through_memory():
    decoder = tiny_decoder(tiny_config(num_layers=2))
    tokens = random_tokens(1, LENGTH)
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 1) % 31
    without = [logits_of(decoder, t, memory_size=0) for t in (tokens, changed)]
    with_memory = [logits_of(decoder, t) for t in (tokens, changed)]
    # two layers of 7 tokens each reach back 14 tokens at most
    assert torch.equal(without[0][:, 15:], without[1][:, 15:])
    assert not torch.equal(with_memory[0][:, 15:], with_memory[1][:, 15:])


def test_gradient_reaches_queries_scale_and_gate_but_not_the_memory():
    decoder = tiny_decoder().train()
    tokens = random_tokens(3, 21)
    state = decoder.new_state(3)
    for start in (0, 7):
        out = decoder(
            tokens[:, start : start + 7], state=state, targets=tokens[:, start + 1 : start + 8]
        )
        out.loss.backward()
        assert all(not side.requires_grad for layer in out.new_entries.layers for side in layer)
        state = state.commit(out.new_entries)
    attention = decoder.blocks[1].attention
    decoder.zero_grad()
    decoder(tokens[:, 14:20], state=state, targets=tokens[:, 15:21]).loss.backward()
    for parameter in (attention.mix.gate_bias, attention.log_scale, attention.queries.weight):
        assert parameter.grad.abs().sum() > 0


def test_loss_and_gradient_do_not_depend_on_padding_or_idle_rows():
    decoder = tiny_decoder().train()
    tokens = random_tokens(3, 8)
    targets = tokens[:, 1:].clone()
    targets[0, 4:] = -100
    targets[2] = -100
    num_tokens = torch.tensor([4, 7, 0])
    padded = decoder(tokens[:, :7], num_tokens=num_tokens, targets=targets)
    gradients = torch.autograd.grad(padded.loss, list(decoder.parameters()), allow_unused=True)
    other = tokens.clone()
    other[0, 4:] = 5
    other[2] = 9
    again = decoder(other[:, :7], num_tokens=num_tokens, targets=targets)
    torch.testing.assert_close(padded.loss, again.loss)
    for one, two in zip(
        gradients,
        torch.autograd.grad(again.loss, list(decoder.parameters()), allow_unused=True),
        strict=True,
    ):
        if one is not None:
            torch.testing.assert_close(one, two)

import pytest
import torch

from byheart.evaluation.token_losses import token_loss_differences

NUM_TOKENS = 139


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(257, (NUM_TOKENS,), generator=generator)


@pytest.mark.parametrize("write", ["segment", "evicted"])
@pytest.mark.parametrize(("small", "large"), [(17, 37), (21, 101), (28, 139), (31, 47)])
def test_losses_are_identical_until_the_smaller_memory_evicts(
    make_decoder, tokens, write, small, large
):
    decoder = make_decoder(knn_memory={"write": write})
    losses_a, losses_b = token_loss_differences(decoder, tokens, small, large)
    assert losses_a.shape == losses_b.shape == (NUM_TOKENS - 1,)
    # a token is written when its segment of 7 ends, or when it leaves the XL cache of 7
    reach = small if write == "segment" else small + 7
    prefix = (reach // 7 + 1) * 7
    assert torch.equal(losses_a[:prefix], losses_b[:prefix])
    assert not torch.equal(losses_a[prefix:], losses_b[prefix:])


def test_differences_are_first_minus_second(make_decoder, tokens):
    decoder = make_decoder()
    forth = token_loss_differences(decoder, tokens, 17, 0)
    back = token_loss_differences(decoder, tokens, 0, 17)
    assert torch.equal(forth.differences, -back.differences)
    assert torch.equal(forth.differences, forth.losses_a - forth.losses_b)
    assert forth.differences.any()


def test_same_size_gives_zeros_and_keeps_the_mode(make_decoder, tokens):
    decoder = make_decoder(dropout=0.5).train()
    assert not token_loss_differences(decoder, tokens.int(), 17, 17).differences.any()
    assert decoder.training


def test_refuses_what_it_cannot_read(make_decoder, tokens):
    with pytest.raises(ValueError, match="at least 2 tokens to predict one, got 1"):
        token_loss_differences(make_decoder(), tokens[:1], 0, 17)
    with pytest.raises(ValueError, match="memory_size must be 0"):
        token_loss_differences(make_decoder(), tokens, 17, -1)
    with pytest.raises(ValueError, match="no kNN memory, got memory_size=17"):
        token_loss_differences(make_decoder(knn_memory=None), tokens, 0, 17)

import pytest
import torch

from byheart.evaluation.reading import evaluating, num_state_bytes


def read_two_segments(decoder, tokens, *, hides_cache):
    state = decoder.new_state(len(tokens))
    with evaluating(decoder):
        for start in (0, 7, 14):
            shown = state.without_xl_cache() if hides_cache else state
            out = decoder(tokens[:, start : start + 7], state=shown)
            state = state.commit(out.new_entries)
    return state, out.logits


@pytest.mark.parametrize("write", ["segment", "evicted"])
def test_hiding_the_xl_cache_keeps_what_enters_memory(make_decoder, write):
    # keys and values of layer 0 depend on nothing but their token
    decoder = make_decoder(knn_memory={"layers": (0,), "write": write})
    tokens = torch.randint(257, (3, 21))
    state, logits = read_two_segments(decoder, tokens, hides_cache=False)
    hidden, other_logits = read_two_segments(decoder, tokens, hides_cache=True)
    assert not torch.equal(logits, other_logits)
    written = 21 if write == "segment" else 14
    assert hidden.stores[0].num_written.tolist() == [written] * 3
    for name, content in state.stores[0].state_dict().items():
        assert torch.equal(content, hidden.stores[0].state_dict()[name])
    assert torch.equal(state.num_cached, hidden.num_cached)


def test_state_bytes_count_shared_storage_once(make_decoder):
    decoder = make_decoder(xl_cache_length=5)
    empty = decoder.new_state(3)
    numbers_per_token = 2 * 3 * 5
    memory = 3 * 17 * numbers_per_token
    assert num_state_bytes(empty) == 4 * (memory + 2 * 3 * 5 * numbers_per_token)
    out = decoder(torch.randint(257, (3, 7)), state=empty)
    # the cache of 5 tokens is a view of the segment of 7, which stays whole
    assert num_state_bytes(empty.commit(out.new_entries)) == 4 * (
        memory + 2 * 3 * 7 * numbers_per_token
    )


def test_modes_come_back_after_an_error(make_decoder):
    decoder = make_decoder().train()
    decoder.norm.eval()
    modes = [module.training for module in decoder.modules()]

    def fail():
        with evaluating(decoder):
            assert not any(module.training for module in decoder.modules())
            assert torch.is_inference_mode_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [module.training for module in decoder.modules()] == modes

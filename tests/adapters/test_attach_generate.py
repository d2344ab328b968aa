"""Generation with an attached memory equals recomputation, in every way transformers offers."""

import pytest
import torch
from transformers import GenerationConfig

from byheart import KnnMemoryConfig, generate, read_tokens
from byheart.adapters.attach import attach
from byheart.adapters.memory_generate import memory_in_sight

SEGMENT = 7


def opened(model, **options):
    knn = KnnMemoryConfig(layers=(1,), memory_size=17, top_k=5)
    memory_model = attach(model, knn=knn, segment_length=SEGMENT, **options)
    torch.manual_seed(3)
    for weight in memory_model.memory_parameters():
        with torch.no_grad():
            weight.add_(0.5 * torch.randn_like(weight))
    return memory_model.eval()


OPTIONS = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}


def recomputed(memory_model, ids, steps):
    """Greedy search that reads everything after the complete segments again for each token."""
    complete = (ids.shape[1] - 1) // SEGMENT * SEGMENT
    state = memory_model.new_state(1)
    if complete:
        state = read_tokens(memory_model, ids[:, :complete], state).state
    from byheart.adapters.attention_hook import VIEW
    from byheart.adapters.memory_context import MemoryContext

    for _ in range(steps):
        rest = ids[:, complete:]
        context = MemoryContext.of(
            state, memory_model.layers, memory_model.memory_config, torch.float32
        )
        view, positions = context.view(torch.arange(rest.shape[1])[None], stages=False)
        extra = {} if positions is None else {"position_ids": positions}
        logits = memory_model.model(rest, use_cache=False, **extra, **{VIEW: view}).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize(
    ("length", "cache"), [(1, 0), (5, SEGMENT), (7, 0), (23, 0), (23, SEGMENT)]
)
def test_greedy_equals_recomputation(attachable, cache, length, draw):
    memory_model = opened(attachable.build(), xl_cache_length=cache)
    ids = draw(1, length)
    made = memory_model.generate(ids, **OPTIONS)
    assert torch.equal(made, recomputed(memory_model, ids, 9))


@pytest.mark.parametrize(("side", "cache"), [("left", SEGMENT), ("right", 0)])
def test_prompts_of_different_lengths_in_one_batch(attachable, cache, side, draw):
    memory_model = opened(attachable.build(), xl_cache_length=cache)
    lengths = [23, 4, 15]
    ids, mask = draw(3, 23), torch.zeros(3, 23, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 23 - length :] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    made = memory_model.generate(ids, attention_mask=mask, **OPTIONS)
    for row in range(3):
        alone = memory_model.generate(ids[row, mask[row].bool()][None], **OPTIONS)
        assert torch.equal(made[row, 23:], alone[0, lengths[row] :])


def test_it_goes_on_from_a_state_in_the_middle_of_a_segment(attachable, draw):
    memory_model = opened(attachable.build(), xl_cache_length=SEGMENT)
    ids = draw(2, 33)
    expected = memory_model.generate(ids, **OPTIONS)
    for cut in (3, 7, 31):
        state = read_tokens(memory_model, ids[:, :cut], memory_model.new_state(2)).state
        made = memory_model.generate(ids[:, cut:], state=state, **OPTIONS)
        assert torch.equal(made, expected[:, cut:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_beams_and_caches(name, options, tiny_model, draw):
    memory_model = opened(tiny_model(name), xl_cache_length=SEGMENT)
    ids = draw(2, 16)
    made = memory_model.generate(ids, **{**OPTIONS, **options})
    for row in range(2):
        alone = memory_model.generate(ids[row : row + 1], **{**OPTIONS, **options})
        copies = len(alone)
        assert torch.equal(made[copies * row : copies * (row + 1)], alone)
    if "num_beams" not in options:
        assert torch.equal(made, memory_model.generate(ids, **OPTIONS))


def test_it_is_called_as_transformers_own(tiny_model, draw):
    memory_model, ids = opened(tiny_model("llama")), draw(2, 17)
    expected = memory_model.generate(ids, **OPTIONS)
    config = GenerationConfig(**OPTIONS)
    for found in (
        memory_model.generate(inputs=ids, **OPTIONS),
        memory_model.generate(input_ids=ids, generation_config=config),
        memory_model.generate(ids, config),
    ):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="Pass the prompts as input_ids"):
        memory_model.generate(**OPTIONS)


def test_single_tokens_can_be_kept_out(tiny_model, draw):
    memory_model, ids = opened(tiny_model("llama")), draw(1, 17)
    first = int(memory_model.generate(ids, **{**OPTIONS, "max_new_tokens": 1})[0, -1])
    for option in (
        {"bad_words_ids": [[first]]},
        {"sequence_bias": {(first,): -100.0}},
        {"sequence_bias": [[[first], -100.0]]},
    ):
        assert first not in memory_model.generate(ids, **OPTIONS, **option)[0, 17:]


def test_rows_that_belong_to_no_row_of_the_state_are_refused(tiny_model, draw):
    memory_model = opened(tiny_model("llama"))
    state = memory_model.new_state(2)
    with (
        memory_in_sight(memory_model, state),
        pytest.raises(ValueError, match="got 3 rows for 2 of the state"),
    ):
        memory_model.model(draw(3, 5), attention_mask=torch.ones(3, 5).long())


def test_samples_of_a_row_read_its_memory(tiny_model, draw):
    memory_model = opened(tiny_model("llama"))
    ids = draw(2, 16)
    torch.manual_seed(0)
    made = memory_model.generate(
        ids, **{**OPTIONS, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    )
    greedy = memory_model.generate(ids, **OPTIONS)
    assert torch.equal(made, greedy.repeat_interleave(3, 0))


def test_samples_are_drawn_from_what_recomputation_finds(tiny_model, draw):
    memory_model, temperature, top_k = opened(tiny_model("llama")), 0.7, 4
    torch.manual_seed(0)
    made = memory_model.generate(
        draw(2, 16), **{**OPTIONS, "do_sample": True, "temperature": temperature, "top_k": top_k},
        num_return_sequences=3, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert len({tuple(row.tolist()) for row in made.sequences}) == 6
    # complete segments of the prompt are memory, and what is generated goes on behind them
    complete = 2 * SEGMENT
    state = memory_model.new_state(6)
    state = read_tokens(memory_model, made.sequences[:, :complete], state).state
    torch.manual_seed(0)
    for step, scores in enumerate(made.scores):
        drawn = torch.multinomial(scores.softmax(-1), 1)
        assert torch.equal(drawn[:, 0], made.sequences[:, 16 + step])
        behind = made.sequences[:, complete : 16 + step]
        if behind.shape[1] <= SEGMENT:
            expected = memory_model(behind, state=state).logits[:, -1] / temperature
            least = expected.topk(top_k).values[:, -1:]
            expected = expected.masked_fill(expected < least, -torch.inf)
            torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-5)
    assert torch.isfinite(scores).sum(-1).tolist() == [top_k] * 6


def test_endless_generation_writes_what_leaves_the_window(tiny_model, draw):
    memory_model = opened(tiny_model("llama"), xl_cache_length=SEGMENT)
    made = generate(memory_model, draw(2, 5), max_new_tokens=40)
    assert made.state.stores[1].num_written.tolist() == [42, 42]
    ids = torch.cat([draw(2, 5), made.tokens], dim=1)
    read = read_tokens(memory_model, ids[:, :-1], memory_model.new_state(2), return_logits=True)
    assert torch.equal(read.logits[:, 4:].argmax(-1), made.tokens)

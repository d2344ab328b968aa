"""Generation crosses segment boundaries and equals recomputation."""

import inspect

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.recurrent_generate import generate
from byheart.models.recurrent_config import RecurrentMemoryConfig

VOCAB, WIDTH = 37, 24


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32,
            bos_token_id=None, eos_token_id=None, initializer_range=0.3,
        )
    )  # fmt: skip


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            bos_token_id=None, eos_token_id=None, initializer_range=0.3,
        )
    )  # fmt: skip


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB, d_model=WIDTH, d_kv=12, num_heads=2, d_ff=40, num_layers=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=3.0,
        )
    )  # fmt: skip


def wrap(model, **changes):
    options = {"segment_length": 7, "num_memory_tokens": 3, **changes}
    return RecurrentMemory(model, RecurrentMemoryConfig(**options)).eval()


@pytest.fixture(params=[gpt2, llama])
def decoder(request):
    torch.manual_seed(0)
    return wrap(request.param())


@torch.no_grad()
def by_recomputation(memory_model, ids, count):
    for _ in range(count):
        logits = memory_model(ids, logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, -count:]


@pytest.mark.parametrize("length", [1, 6, 7, 8, 14, 17])
def test_greedy_equals_recomputation_across_segments(decoder, length):
    ids = torch.randint(0, VOCAB, (2, length))

    new, _ = decoder.generate(ids, max_new_tokens=19, do_sample=False)

    assert torch.equal(new, by_recomputation(decoder, ids, 19))


def test_rows_of_other_lengths_change_nothing(decoder):
    texts = [torch.randint(0, VOCAB, (length,)) for length in (3, 7, 12)]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, 12 - len(text) :], mask[row, 12 - len(text) :] = text, 1

    together, _ = decoder.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)

    for row, text in enumerate(texts):
        alone, _ = decoder.generate(text[None], max_new_tokens=16, do_sample=False)
        assert torch.equal(together[row], alone[0])


def test_state_is_that_after_reading_text_and_new_tokens(decoder):
    ids = torch.randint(0, VOCAB, (2, 9))

    new, state = decoder.generate(ids, max_new_tokens=11, do_sample=False)

    out = decoder(torch.cat([ids, new], dim=1), logits_to_keep=0)
    expected = decoder.new_state(2).commit(out.new_entries)
    torch.testing.assert_close(state.memory, expected.memory, atol=1e-5, rtol=1e-5)
    assert state.position.tolist() == [20, 20]
    assert torch.equal(state.pending[:, :6], expected.pending[:, :6])


def test_generation_goes_on_from_its_state(decoder):
    ids = torch.randint(0, VOCAB, (2, 5))
    whole, _ = decoder.generate(ids, max_new_tokens=15, do_sample=False)

    first, _ = decoder.generate(ids, max_new_tokens=6, do_sample=False)
    text = torch.cat([ids, first[:, :-1]], dim=1)
    state = decoder.new_state(2).commit(decoder(text, logits_to_keep=0).new_entries)
    rest, _ = decoder.generate(first[:, -1:], state=state, max_new_tokens=9, do_sample=False)

    assert torch.equal(torch.cat([first, rest], dim=1), whole)


@pytest.mark.parametrize("pad", [VOCAB - 1, VOCAB, -100])
def test_row_that_ends_is_filled_and_stands_still(decoder, pad):
    ids = torch.randint(0, VOCAB, (2, 5))
    whole, _ = decoder.generate(ids, max_new_tokens=20, do_sample=False)
    end = int(whole[0, 4])
    stops = [row.tolist().index(end) + 1 if end in row else 20 for row in whole]

    new, state = decoder.generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=pad
    )

    for row, stop in enumerate(stops):
        assert torch.equal(new[row, :stop], whole[row, :stop])
        assert set(new[row, stop:].tolist()) <= {pad}
    assert state.position.tolist() == [5 + stop for stop in stops]


def test_a_row_that_has_ended_does_not_carry_others_past_their_window():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=7 + 2 * 3,
        bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    decoder = wrap(GPT2LMHeadModel(config))
    for seed in range(4):
        torch.manual_seed(seed)
        ids = torch.randint(0, VOCAB, (2, 6))
        free, _ = decoder.generate(ids, max_new_tokens=20, do_sample=False)
        end = int(free[0, 0])  # the first row ends at once, in a segment that is nearly full
        options = {"do_sample": False, "eos_token_id": end, "pad_token_id": VOCAB - 1}
        both, state = decoder.generate(ids, max_new_tokens=20, **options)
        for row in range(2):
            alone, after = decoder.generate(ids[row : row + 1], max_new_tokens=20, **options)
            assert torch.equal(both[row, : alone.shape[1]], alone[0])
            assert state.position[row] == after.position[0]


def test_tokens_that_a_models_own_config_forces_do_not_end_segments(decoder):
    ids = torch.randint(0, VOCAB, (2, 5))
    free, _ = decoder.generate(ids, max_new_tokens=15, do_sample=False)
    decoder.model.generation_config.forced_eos_token_id = 3
    decoder.model.generation_config.return_dict_in_generate = True
    new, _ = decoder.generate(ids, max_new_tokens=15, do_sample=False)
    assert torch.equal(new, free)


def test_sampling_follows_the_seed(decoder):
    ids = torch.randint(0, VOCAB, (2, 5))
    torch.manual_seed(3)
    first, _ = decoder.generate(ids, max_new_tokens=12, do_sample=True)
    torch.manual_seed(3)
    second, _ = decoder.generate(ids, max_new_tokens=12, do_sample=True)

    assert torch.equal(first, second)


def test_answer_of_encoder_decoder_equals_recomputation():
    torch.manual_seed(0)
    memory_model = wrap(t5(), end_ids=(1,), alignment="right")
    ids = torch.randint(2, VOCAB, (2, 17))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0

    answers, _ = memory_model.generate(ids, attention_mask=mask, max_new_tokens=5)

    labels = torch.full((2, 1), 2)
    for column in range(answers.shape[1]):
        with torch.no_grad():
            logits = memory_model(ids, attention_mask=mask, labels=labels).logits
        best = logits[:, column].argmax(dim=-1)
        running = answers[:, :column].ne(1).all(dim=1)
        assert torch.equal(answers[running, column], best[running])
        labels = torch.cat([answers[:, : column + 1], torch.full((2, 1), 2)], dim=1)


def test_classifier_is_refused():
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=32,
    )  # fmt: skip
    memory_model = wrap(BertForSequenceClassification(config))

    with pytest.raises(ValueError, match="needs a causal language model or an encoder-decoder"):
        memory_model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)


def test_encode_needs_an_encoder(decoder):
    with pytest.raises(ValueError, match="encode is for encoder-decoders, got"):
        decoder.encode(torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams cannot be honoured across segments"),
        ({"num_return_sequences": 2}, "num_return_sequences cannot be honoured"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty .* got 1.2; use repetition_penalty=1.0"),
        ({"no_repeat_ngram_size": 1}, "no_repeat_ngram_size cannot be honoured"),
        ({"stopping_criteria": [max]}, "stopping_criteria cannot be honoured"),
        ({"forced_eos_token_id": 3}, "forced_eos_token_id must be None for a decoder with recur"),
        ({"begin_suppress_tokens": [3]}, r"begin_suppress_tokens must be None .* got \[3\]"),
        ({"exponential_decay_length_penalty": (1, 2.0)}, "exponential_decay_length_penalty cannot"),
        (
            {"generation_config": GenerationConfig(eos_token_id=3)},
            "give its options by their names",
        ),
        ({"guidance_scale": 2.0}, "guidance_scale cannot be honoured across segments"),
        ({"logits_processor": [max]}, "logits_processor cannot be honoured"),
        ({"prefix_allowed_tokens_fn": max}, "prefix_allowed_tokens_fn cannot be honoured"),
        ({"bad_words_ids": [[3, 4]]}, r"bad_words_ids must be about single .* got \[\[3, 4\]\]"),
        ({"sequence_bias": {(3, 4): 1.0}}, "sequence_bias must be about single tokens"),
        ({"sequence_bias": [[[3, 4], 1.0]]}, "sequence_bias must be about single tokens"),
        ({"token_type_ids": torch.ones(1, 3)}, r"takes the options .*temperature.*, got token_ty"),
        ({"max_new_tokens": 2.5}, "at least 1, a whole number, got 2.5"),
        ({"return_dict_in_generate": True}, "leave return_dict_in_generate out"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, a whole number, got 0"),
        ({"attention_mask": torch.zeros(1, 3)}, "must have at least one token to continue"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "row 0 has holes"),
    ],
)
def test_what_cannot_be_honoured_is_refused(decoder, options, message):
    # as a user calls it, whose types nothing checks before
    plain = inspect.unwrap(generate)
    with pytest.raises(ValueError, match=message):
        plain(decoder, torch.ones(1, 3, dtype=torch.long), **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words_ids": [[3], [5]]},
        {"sequence_bias": {(3,): -99.0, (5,): -99.0}},
        {"sequence_bias": [[[3], -99.0], [[5], -99.0]]},
        {"suppress_tokens": [3, 5]},
    ],
)
def test_options_about_single_tokens_hold_in_every_segment(decoder, options):
    ids = torch.randint(6, VOCAB, (2, 5))
    new, _ = decoder.generate(ids, max_new_tokens=30, do_sample=False, **options)
    assert not torch.isin(new, torch.tensor([3, 5])).any()


@pytest.mark.parametrize(
    "options", [{"encoder_no_repeat_ngram_size": 2}, {"encoder_repetition_penalty": 1.5}]
)
def test_options_about_the_text_of_an_encoder_are_refused(options):
    memory_model = wrap(t5())
    ids = torch.randint(3, VOCAB, (1, 5))
    with pytest.raises(ValueError, match=r"cannot be honoured, got .* only the memory is left"):
        memory_model.generate(ids, max_new_tokens=2, **options)
    (name,) = options
    setattr(memory_model.model.generation_config, name, options[name])
    for config in (None, GenerationConfig(eos_token_id=3)):
        with pytest.raises(ValueError, match=f"Use {name}="):
            memory_model.generate(ids, max_new_tokens=2, generation_config=config)


def test_an_encoder_decoder_of_experts_answers():
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=12, num_heads=2, d_ff=40, num_layers=2,
        num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        num_experts=2, expert_capacity=64, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    memory_model = wrap(SwitchTransformersForConditionalGeneration(config))
    new, state = memory_model.generate(torch.randint(3, VOCAB, (3, 11)), max_new_tokens=4)
    assert len(new) == 3
    assert state.position.tolist() == [11] * 3


def test_what_the_models_own_options_ask_for_is_refused_too(decoder):
    ids = torch.ones(1, 3, dtype=torch.long)
    decoder.model.generation_config.repetition_penalty = 1.1
    decoder.model.generation_config.max_length = 20

    with pytest.raises(ValueError, match="repetition_penalty cannot be honoured"):
        decoder.generate(ids, max_new_tokens=2)

    new, _ = decoder.generate(ids, max_new_tokens=9, repetition_penalty=1.0)
    assert torch.equal(new, by_recomputation(decoder, ids, 9))


def test_a_text_that_is_no_batch_is_refused(decoder):
    with pytest.raises(ValueError, match=r"Give a single text as input_ids\[None\]"):
        # without the type checks of the tests
        inspect.unwrap(generate)(decoder, torch.ones(3, dtype=torch.long), max_new_tokens=2)


def test_what_is_no_state_is_refused(decoder):
    with pytest.raises(TypeError, match="state must be a RecurrentState, got str"):
        inspect.unwrap(generate)(
            decoder, torch.ones(1, 3, dtype=torch.long), state="memory", max_new_tokens=2
        )


def test_other_alignment_is_refused():
    memory_model = wrap(gpt2(), alignment="right")

    with pytest.raises(ValueError, match="alignment must be 'left' to generate"):
        memory_model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)


@pytest.mark.parametrize("start", [0, 9])
def test_an_answer_that_was_begun_is_not_returned(start):
    torch.manual_seed(0)
    memory_model, ids = wrap(t5()), torch.randint(2, VOCAB, (2, 20))
    # transformers puts the first token of every answer before what has another
    begun = torch.tensor([[start, 5, 6], [start, 7, 8]])
    new, _ = memory_model.generate(
        ids, max_new_tokens=4, decoder_input_ids=begun, eos_token_id=None
    )
    assert new.shape == (2, 4)
    hidden, mask, _ = memory_model.encode(ids)
    given = begun if start == 0 else torch.cat([torch.zeros(2, 1).long(), begun], dim=1)
    for _ in range(4):
        out = memory_model.model(
            encoder_outputs=(hidden,), attention_mask=mask, decoder_input_ids=given
        )
        given = torch.cat([given, out.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(new, given[:, -4:])

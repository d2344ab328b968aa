"""Models that would silently compute something else are found out by trying them."""

import pytest
import torch
import transformers

from byheart.adapters.recurrent import RecurrentMemory
from byheart.models.recurrent_config import RecurrentMemoryConfig

VOCAB = 43
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
LLAMA = {**SMALL, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}


def esm(**changes):
    config = transformers.EsmConfig(**SMALL, mask_token_id=2, **changes)
    return transformers.EsmForSequenceClassification(config)


def phi3(original):
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": original,
    }  # fmt: skip
    config = transformers.Phi3Config(
        **LLAMA, rope_parameters=rope, original_max_position_embeddings=original
    )
    return transformers.Phi3ForCausalLM(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=16, decoder_layers=2, encoder_layers=2, decoder_ffn_dim=24,
        decoder_attention_heads=2, encoder_attention_heads=2, max_position_embeddings=64,
        is_encoder_decoder=False, is_decoder=True, init_std=0.5, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForCausalLM(config)


def rwkv():
    # its config knows of no padding
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, context_length=64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.RwkvForCausalLM(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


@pytest.mark.parametrize(
    "options",
    [
        {"position_embedding_type": "absolute"},
        {"position_embedding_type": "rotary", "emb_layer_norm_before": True},
        {"position_embedding_type": "rotary", "token_dropout": True},
    ],
)
def test_a_model_that_reads_vectors_other_than_tokens_is_refused(options, wrap):
    with pytest.raises(ValueError, match="esm does more with tokens than to look them up"):
        wrap(esm(**options))


def test_the_same_model_without_that_is_taken(wrap, draw):
    model = esm(position_embedding_type="rotary")
    ids = draw(2, 7)
    expected = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(wrap(model, num_memory_tokens=0)(ids).logits, expected)


def test_a_model_that_cannot_read_a_vector_of_no_word_is_refused(wrap):
    config = transformers.Gemma4TextConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, global_head_dim=8, sliding_window=64,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"vectors in the place of tokens .* gemma4_text fails"):
        wrap(transformers.Gemma4ForCausalLM(config))


def test_the_trial_leaves_the_model_as_it_was():
    model = llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    RecurrentMemory(model, RecurrentMemoryConfig(segment_length=7, num_memory_tokens=3))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_angles_that_change_with_the_length_of_a_window_are_refused(wrap, draw):
    model = phi3(16)
    with pytest.raises(ValueError, match=r"beyond 16 tokens, got a window of 26.* at most 10\."):
        wrap(model, segment_length=20)
    memory_model = wrap(model, segment_length=10)
    ids, mask = draw(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    alone = memory_model(ids[1:, :6]).logits
    together = memory_model(ids, attention_mask=mask).logits[1:, :6]
    torch.testing.assert_close(together, alone)


def test_attention_that_depends_on_what_was_read_before_is_refused(wrap):
    settings = {**SMALL, "block_size": 2, "num_random_blocks": 1}
    for kind in ("block_sparse", "original_full"):
        config = transformers.BigBirdConfig(**settings, attention_type=kind)
        model = transformers.BigBirdForSequenceClassification(config)
        if kind == "original_full":
            assert isinstance(wrap(model), RecurrentMemory)
            continue
        with pytest.raises(ValueError, match="attention_type must be 'original_full', got 'block"):
            wrap(model)


def test_a_loss_for_experts_that_would_be_dropped_is_refused(wrap):
    config = transformers.MixtralConfig(
        **LLAMA, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    )
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(ValueError, match="output_router_logits must be False, got True"):
        wrap(model)
    model.config.output_router_logits = False
    wrap(model)


@pytest.mark.parametrize("config", ["MptConfig", "WhisperConfig"])
def test_windows_beyond_what_other_configs_call_their_limit_are_refused(config, wrap):
    if config == "MptConfig":
        made = transformers.MptConfig(
            vocab_size=VOCAB, d_model=16, n_heads=2, n_layers=1, max_seq_len=16
        )
        model = transformers.MptForCausalLM(made)
    else:
        made = transformers.WhisperConfig(
            vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2,
            decoder_ffn_dim=24, max_target_positions=16, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, is_encoder_decoder=False,
        )  # fmt: skip
        model = transformers.WhisperForCausalLM(made)
    with pytest.raises(ValueError, match="window of 16 positions, got 17"):
        wrap(model, segment_length=11)
    wrap(model, segment_length=10)


def test_generation_that_gives_tokens_other_positions_is_refused(wrap, draw):
    config = transformers.RobertaConfig(
        **{**SMALL, "pad_token_id": 1}, is_decoder=True, bos_token_id=None, eos_token_id=None
    )
    memory_model = wrap(transformers.RobertaForCausalLM(config))
    with pytest.raises(ValueError, match="does not for roberta: it gives tokens other pos"):
        memory_model.generate(draw(1, 5), max_new_tokens=3, do_sample=False)


def test_generation_that_cannot_begin_behind_vectors_is_refused_before_anything_is_read(wrap, draw):
    config = transformers.OpenAIGPTConfig(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64
    )
    memory_model = wrap(transformers.OpenAIGPTLMHeadModel(config))
    with pytest.raises(
        ValueError, match=r"(?s)that of openai-gpt fails with ValueError: .* or forward"
    ):
        memory_model.generate(draw(1, 5), max_new_tokens=3, do_sample=False)


def test_generation_that_mixes_rows_is_refused(wrap, draw):
    memory_model = wrap(rwkv())
    with torch.no_grad():
        for parameter in memory_model.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    with pytest.raises(ValueError, match=r"does not for rwkv: .* or mixes rows"):
        memory_model.generate(draw(1, 5), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(("make", "side_by_side"), [(bart, False), (llama, True)])
def test_rows_of_other_lengths_change_nothing(make, side_by_side, wrap, draw):
    torch.manual_seed(0)
    memory_model = wrap(make())
    lengths = (3, 7, 9, 12, 9)
    texts = [draw(1, length)[0] for length in lengths]
    ids, mask = torch.zeros(5, 12, dtype=torch.long), torch.zeros(5, 12, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1

    options = {"max_new_tokens": 10, "do_sample": False}
    together, state = memory_model.generate(ids, attention_mask=mask, **options)

    assert memory_model.generates_behind_padding is side_by_side
    for row, text in enumerate(texts):
        alone, after = memory_model.generate(text[None], **options)
        assert torch.equal(together[row], alone[0])
        torch.testing.assert_close(state.memory[row], after.memory[0], atol=1e-4, rtol=1e-4)
        recomputed = text[None]
        for _ in range(10):
            scores = memory_model(recomputed, logits_to_keep=1).logits[:, -1]
            recomputed = torch.cat([recomputed, scores.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(recomputed[:, len(text) :], alone)


def test_rows_that_end_at_different_places_are_filled(wrap, draw):
    torch.manual_seed(0)
    memory_model = wrap(bart())
    ids, mask = draw(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 4:], mask[2, 8:] = 0, 0
    free, _ = memory_model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    end = int(free[1, 3])
    options = {"do_sample": False, "eos_token_id": end, "pad_token_id": 0, "max_new_tokens": 12}
    new, state = memory_model.generate(ids, attention_mask=mask, **options)
    for row in range(3):
        tokens = free[row].tolist()
        stop = tokens.index(end) + 1 if end in tokens else 12
        assert new[row, :stop].tolist() == tokens[:stop]
        assert set(new[row, stop:].tolist()) <= {0}
        assert int(state.position[row]) == int(mask[row].sum()) + stop

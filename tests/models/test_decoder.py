import math

import pytest
import torch

from byheart.memory.config import KnnMemoryConfig
from byheart.models.config import PRESETS, DecoderConfig, preset
from byheart.models.decoder import Decoder
from byheart.models.streaming import read_tokens
from byheart.testing.tiny import random_tokens, tiny_config, tiny_decoder


def count(config):
    with torch.device("meta"):
        decoder = Decoder(config)
    return sum(p.numel() for n, p in decoder.named_parameters() if "embedding" not in n)


@pytest.mark.parametrize(
    ("name", "millions"), [("5m", 4.7), ("20m", 18.9), ("37m", 37.8), ("184m", 151.0)]
)
def test_presets_have_the_size_of_their_name(name, millions):
    assert count(preset(name, 100)) / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_largest_preset_is_the_papers_model():
    config = preset("184m", 32_000, memory_size=8192)
    assert (config.num_layers, config.embed_dim, config.num_heads, config.head_dim) == (
        12,
        1024,
        8,
        128,
    )
    assert config.segment_length == config.xl_cache_length == config.window == 512
    assert config.knn_memory.layers == (8,)
    assert config.knn_memory.top_k == 32
    embedding = 32_000 * 1024
    assert (count(config) + embedding) / 1e6 == pytest.approx(184, rel=0.01)


def test_every_preset_runs():
    for name in PRESETS:
        if name in ("tiny", "5m"):
            out = Decoder(preset(name, 11, memory_size=64))(random_tokens(1, 5, vocab_size=11))
            assert out.logits.shape == (1, 5, 11)


def test_an_untrained_model_is_near_the_uniform_loss():
    torch.manual_seed(0)
    decoder = Decoder(preset("5m", 257))
    tokens = random_tokens(2, 101, vocab_size=257)
    loss = decoder(tokens[:, :-1], targets=tokens[:, 1:]).loss
    assert loss.item() == pytest.approx(math.log(257), abs=0.1)


def test_loss_is_the_mean_over_predicted_tokens():
    decoder = tiny_decoder()
    tokens = random_tokens(3, 8)
    targets = tokens[:, 1:].clone()
    targets[1, 2:] = -100
    out = decoder(tokens[:, :7], targets=targets, return_logits=True)
    log_probabilities = out.logits.log_softmax(-1)
    kept = targets != -100
    expected = -log_probabilities[kept].gather(1, targets[kept][:, None]).squeeze(1)
    torch.testing.assert_close(out.token_losses[kept], expected)
    torch.testing.assert_close(out.loss, expected.mean())
    assert out.token_losses[~kept].eq(0).all()


def test_a_batch_without_labels_has_loss_zero_and_a_finite_gradient():
    decoder = tiny_decoder()
    out = decoder(random_tokens(2, 7), targets=torch.full((2, 7), -100))
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())


def test_every_parameter_takes_part_in_every_step():
    """Data-parallel training waits for all of them, also while the memory is empty or off."""
    for combine in ("gate", "joint", "content_gate"):
        memory = KnnMemoryConfig(layers=(1,), memory_size=41, top_k=5, combine=combine)
        decoder = tiny_decoder(tiny_config(memory=memory))
        for memory_size in (None, 0):
            decoder.zero_grad()
            state = decoder.new_state(2, memory_size=memory_size)
            decoder(random_tokens(2, 7), state=state, targets=random_tokens(2, 7)).loss.backward()
            assert all(p.grad is not None for p in decoder.parameters())


def test_metrics_name_gates_and_scales():
    metrics = tiny_decoder().memory_metrics()
    assert set(metrics) == {
        "scale/layer1/mean", "gate/layer1/mean", "gate/layer1/min", "gate/layer1/max",
    }  # fmt: skip


@pytest.mark.parametrize("store", ["dense", "faiss"])
def test_autocast_changes_nothing_of_what_a_memory_answers(store):
    memory = KnnMemoryConfig(layers=(1,), memory_size=41, top_k=5, store=store)
    decoder = tiny_decoder(tiny_config(memory=memory))
    state = read_tokens(decoder, random_tokens(2, 28), decoder.new_state(2)).state
    queries = torch.randn(2, 3, 7, 8)
    exact = state.stores[1].attend(queries, torch.ones(3), 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = state.stores[1].attend(queries, torch.ones(3), 5)
    assert torch.equal(exact.output, cast.output)
    assert torch.equal(exact.logsumexp, cast.logsumexp)


def test_a_preset_with_another_depth_keeps_its_memory_at_three_quarters():
    assert preset("5m", 7, memory_size=64, num_layers=24).knn_memory.layers == (17,)
    assert preset("5m", 7, memory_size=64, num_layers=2).knn_memory.layers == (0,)


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match="top_k has no effect without a memory, got 4"):
        preset("5m", 7, top_k=4)
    with pytest.raises(ValueError, match="attention_scale_init has no effect"):
        DecoderConfig(vocab_size=7, normalize_qk=False, attention_scale_init=3.0)
    joint = KnnMemoryConfig(layers=(1,), combine="joint")
    with pytest.raises(ValueError, match="gate_bias_init has no effect"):
        DecoderConfig(vocab_size=7, gate_bias_init=1.0, knn_memory=joint)
    evicted = KnnMemoryConfig(layers=(1,), write="evicted")
    with pytest.raises(ValueError, match=r"\(1024\) with .* got 512"):
        DecoderConfig(vocab_size=7, window_length=512, knn_memory=evicted)


def test_bfloat16_autocast_runs_and_keeps_the_memory_in_float32():
    decoder = tiny_decoder()
    state = decoder.new_state(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for start in (0, 7):
            out = decoder(random_tokens(2, 14)[:, start : start + 7], state=state)
            state = state.commit(out.new_entries)
    assert state.stores[1].keys.dtype == torch.float32
    assert out.logits.dtype == torch.float32
    assert out.logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"segment_length": 0}, "segment_length must be at least 1, got 0"),
        ({"xl_cache_length": -1}, "xl_cache_length must be at least 0, got -1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"attention_scale_init": 0.0}, "attention_scale_init must be above 0, got 0.0"),
        (
            {"num_layers": 4, "knn_memory": KnnMemoryConfig(layers=(4,))},
            r"between 0 and 3 \(the decoder has 4 layers\), got 4",
        ),
        ({"knn_memory": KnnMemoryConfig(layers=(1, 1))}, "must not repeat a layer"),
        (
            {
                "empty_slots": "zeros",
                "knn_memory": KnnMemoryConfig(layers=(1,), store="faiss"),
            },
            "empty_slots='zeros' needs knn_memory.store='dense'",
        ),
    ],
)
def test_configs_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{"vocab_size": 7, **change})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 9}, r"between 1 and memory_size \(8\), got 9"),
        ({"top_k": 0}, "got 0"),
        ({"memory_size": 0}, "memory_size must be at least 1, got 0"),
        ({"layers": ()}, "at least one layer"),
        ({"num_buckets": 4}, "has no effect with search='exact'"),
        ({"search": "strided_bucket", "num_buckets": 3}, r"divide memory_size \(8\)"),
        ({"search": "strided_bucket", "num_buckets": 2}, r"at least top_k \(4\), got 2"),
        ({"search": "strided_bucket", "store": "faiss"}, "needs store='dense'"),
    ],
)
def test_memory_configs_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        KnnMemoryConfig(**{"layers": (1,), "memory_size": 8, "top_k": 4, **values})


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="one of tiny, 5m, 20m, 37m, 184m, got '5M'"):
        preset("5M", 11)

"""The doctor says of a config what attach says of the model."""

from dataclasses import replace

import pytest
import transformers

from byheart import KnnMemoryConfig
from byheart.adapters import doctor
from byheart.adapters.attach import attach
from byheart.adapters.attach_config import AttachConfig
from byheart.adapters.doctor import Diagnosis, diagnose
from byheart.errors import CheckpointError
from byheart.memory.dense import DenseStore

KNN = KnnMemoryConfig(layers=(-1,), memory_size=1000, top_k=5, dtype="bfloat16")


def test_it_says_what_attach_finds(attachable, tmp_path):
    model = attachable.build()
    model.config.save_pretrained(tmp_path)
    config = AttachConfig(knn=KNN, segment_length=7, xl_cache_length=7)
    found = diagnose(tmp_path, config)
    memory_model = attach(model, knn=KNN, segment_length=7, xl_cache_length=7)
    assert found.is_supported
    assert found.layers == memory_model.layers.names
    assert found.memory_layers == memory_model.layers.names[-1:]
    memory = sum(weight.numel() for weight in memory_model.memory_parameters())
    total = sum(weight.numel() for weight in memory_model.parameters())
    assert found.num_parameters == total - memory
    state = memory_model.new_state(1)
    store = state.stores[1]
    assert found.memory_bytes == store.keys.nbytes + store.values.nbytes
    assert found.xl_cache_bytes == sum(side.nbytes for layer in state.xl_cache for side in layer)
    expected = "none" if attachable.name in ("gpt2", "opt") else "whole"
    if attachable.name == "phi":
        expected = "first 2 of 4"
    second = "none" if attachable.name in ("cohere2", "smollm3") else expected
    assert found.rotations == (expected, second)


def test_it_looks_at_a_layer_of_each_kind(tiny_model, tmp_path):
    tiny_model("smollm3", num_hidden_layers=5, no_rope_layers=None).config.save_pretrained(tmp_path)
    found = diagnose(tmp_path, AttachConfig(knn=KNN, segment_length=7))
    assert found.rotations == ("whole", "whole", "whole", "none")


_SMALL = {
    "vocab_size": 43, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [("Cwm", {"num_key_value_heads": 2, "bos_token_id": 1}), ("ModernBertDecoder", {})],
)
def test_families_that_need_all_special_tokens_are_tried(name, changes, tmp_path):
    config = getattr(transformers, f"{name}Config")(
        **_SMALL, pad_token_id=0, eos_token_id=2, **changes
    )
    config.save_pretrained(tmp_path)
    found = diagnose(tmp_path, AttachConfig(knn=KNN, segment_length=7))
    assert found.reason is None
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    assert found.layers == attach(model, knn=KNN, segment_length=7).layers.names


def test_what_fails_in_the_trial_is_an_answer(tiny_model, tmp_path, monkeypatch):
    tiny_model("llama").config.save_pretrained(tmp_path)

    def fail(_):
        raise AttributeError("property 'layer_types' of 'Odd' object has no setter")

    monkeypatch.setattr(doctor, "_trial_model", fail)
    found = diagnose(tmp_path, AttachConfig(knn=KNN, segment_length=7))
    assert found.reason == (
        "llama failed in a trial of its first layers: property 'layer_types' of 'Odd' object has "
        "no setter. Use another model."
    )


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("bloom", {}, "does not do so"),
        ("bert", {}, "must be a causal language model"),
        ("gpt2", {"memory_position": "local"}, "rotary positions, which gpt2"),
        ("gemma2", {"knn": KnnMemoryConfig(layers=(0,), combine="joint")}, "caps them"),
        ("llama", {"knn": KnnMemoryConfig(layers=(2,))}, "knn.layers must be between 0 and 1"),
        ("llama", {"knn": KnnMemoryConfig(layers=(-1, 1))}, "knn.layers must name each layer once"),
        ("llama", {"segment_length": 65}, "must fit into the model's 64 positions"),
    ],
)
def test_it_says_why_not(name, options, reason, tiny_model, tmp_path):
    tiny_model(name).config.save_pretrained(tmp_path)
    found = diagnose(tmp_path, AttachConfig(**{"knn": KNN, "segment_length": 7, **options}))
    assert not found.is_supported
    assert reason in found.reason


def test_the_share_of_the_search_is_that_of_its_products(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    found = diagnose(tmp_path, AttachConfig(knn=KNN, segment_length=7))
    heads, head_dim = 4, 4
    others = model.num_parameters() - model.model.embed_tokens.weight.numel()
    assert found.search_share == pytest.approx(2 * 1000 * heads * head_dim / (2 * others))


def test_it_estimates_the_time_that_reading_adds(tiny_model, tmp_path, monkeypatch):
    tiny_model("llama").config.save_pretrained(tmp_path)
    seen = []
    attend = DenseStore.attend

    def attend_slowly(store, queries, *arguments):
        read = attend(store, queries, *arguments)
        # the trial's memory has all heads
        if store.keys.shape[1] == 1:
            seen.append((store.keys.shape, tuple(store.num_written.tolist()), queries.shape))
            clock[0] += 0.25
        return read

    clock = [0.0]
    monkeypatch.setattr(DenseStore, "attend", attend_slowly)
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: clock[0])
    knn = KnnMemoryConfig(layers=(0, 1), memory_size=65_536, top_k=5)
    found = diagnose(tmp_path, AttachConfig(knn=knn, segment_length=7))
    # one of two key-value heads with its two queries, a fourth of the entries, in two layers
    assert set(seen) == {((1, 1, 16_384, 4), (16_384,), (1, 2, 7, 4))}
    assert found.read_microseconds == pytest.approx(0.25e6 * 2 * 4 * 2 / 7)


@pytest.mark.parametrize(
    "knn",
    [
        KnnMemoryConfig(layers=(0,), memory_size=40, top_k=7),
        KnnMemoryConfig(
            layers=(0,), memory_size=3 * 11_000, top_k=7, search="strided_bucket", num_buckets=11
        ),
        KnnMemoryConfig(layers=(0,), memory_size=20_000, top_k=18_000, dtype="bfloat16"),
    ],
    ids=str,
)
def test_it_estimates_a_time_for_every_dense_memory(knn, tiny_model, tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    assert diagnose(tmp_path, AttachConfig(knn=knn, segment_length=7)).read_microseconds > 0


def test_it_estimates_the_time_of_the_model_by_its_first_layers(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama", num_hidden_layers=9)
    model.config.save_pretrained(tmp_path)
    assert diagnose(tmp_path, AttachConfig(knn=KNN, segment_length=7)).model_microseconds > 0
    monkeypatch.setattr(doctor, "_model_microseconds", lambda *_: 25.0)
    found = diagnose(tmp_path, AttachConfig(knn=KNN, segment_length=7))
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    output, norm = model.lm_head.weight, model.model.norm.weight.numel()
    trial = 2 * layer + norm + 64 * output.shape[1]  # two layers, and a vocabulary of 64
    whole = 9 * layer + norm + output.numel()
    assert found.model_microseconds == pytest.approx(25 * whole / trial)


def test_a_memory_is_searched_as_far_as_it_is_full():
    found = Diagnosis(
        model_type="llama", reason=None, memory_size=100, read_microseconds=2e6,
        model_microseconds=1e6,
    )  # fmt: skip
    # of a memory of 100 the tokens see 0 to 50 entries, on average 25
    assert found.document_seconds(50) == pytest.approx((50.0, 2 * 50 * 0.25))
    assert found.document_seconds(300) == pytest.approx((300.0, 2 * (100 * 0.5 + 200)))
    assert Diagnosis(model_type="llama", reason=None).document_seconds(50) is None
    nothing = Diagnosis(model_type="llama", reason=None, model_microseconds=1e6)
    assert nothing.document_seconds(50) == (50.0, 0.0)


def test_positions_that_end_are_said(tiny_model, tmp_path):
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    config = AttachConfig(knn=KNN, segment_length=7)
    assert diagnose(tmp_path, config).max_document_tokens is None
    assert diagnose(tmp_path, replace(config, xl_cache_length=7)).max_document_tokens == 64


def test_without_a_memory_there_is_no_time(tiny_model, tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    assert diagnose(tmp_path, AttachConfig(segment_length=7)).read_microseconds is None


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read as a Hugging Face model"):
        diagnose(tmp_path, AttachConfig(knn=KNN))


@pytest.mark.parametrize(
    "options",
    [
        {"memory_size": 8192, "top_k": 32, "num_buckets": 128},
        {"memory_size": 60, "top_k": 6},
        {"memory_size": 6, "top_k": 2, "num_buckets": 3},
    ],
)
def test_it_allows_buckets_that_attach_allows(options, tiny_model, tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    knn = KnnMemoryConfig(layers=(1,), search="strided_bucket", **options)
    attach(model, knn=knn, segment_length=7)
    assert diagnose(tmp_path, AttachConfig(knn=knn, segment_length=7)).reason is None

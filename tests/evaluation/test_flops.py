import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from byheart.errors import DataError
from byheart.evaluation import flops_plot, plots
from byheart.evaluation.flops import HONEST, REPORT, Flops, FlopsConvention, forward_flops
from byheart.evaluation.flops_compare import compare_flops
from byheart.evaluation.flops_config import find_shape, shape_from_config
from byheart.evaluation.flops_plot import plot_flops_growth
from byheart.evaluation.flops_shapes import NAMED_SHAPES, ModelShape
from byheart.memory.config import KnnMemoryConfig

TOKENS = 2_048_000
FIGURE_3 = ("opt-125m", "opt-1.3b", "opt-6.7b", "opt-30b", "opt-175b")
MATMULS = replace(HONEST, softmax_flops=0)
# different numbers everywhere, so that no swapped width can pass
TINY = ModelShape(
    name="tiny", kind="decoder", num_layers=3, embed_dim=20, hidden_dim=31, num_heads=6,
    vocab_size=41, num_kv_heads=2, head_dim=7, embedding_dim=13, gated_mlp=True,
)  # fmt: skip


def counted(function, *arguments):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def ratio(shape, convention, window=512, text=512):
    """Charge every token of the window, as the variants of the formula do."""
    at_once = forward_flops(shape, TOKENS, convention).total
    return at_once / (TOKENS / text * forward_flops(shape, window, convention).total)


@pytest.mark.parametrize(
    ("name", "published"),
    list(zip(FIGURE_3, (295.066, 154.416, 81.649, 48.385, 29.015), strict=True)),
)
def test_report_convention_gives_figure_3(name, published):
    comparison = compare_flops(NAMED_SHAPES[name], TOKENS, segment_length=512)
    assert comparison.ratio == pytest.approx(published, abs=1e-3)
    assert comparison.num_segments == 4000


def test_report_convention_is_the_formula():
    layers, d, f, h, vocab, s = 3, 20, 31, 6, 41, 11
    by_hand = 2 * s * vocab * d + layers * (
        6 * s * d**2 + 2 * s**2 * d + 10 * h * s**2 + 2 * s**2 * d + 2 * s * d**2 + 4 * s * d * f
    )
    assert forward_flops(TINY, s, REPORT).total == by_hand


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"softmax_flops": 3}, (287.9, 150.5, 80.6, 47.8, 28.6)),
        ({"softmax_flops": 3, "vocab_matmuls": 2}, (223.4, 140.0, 78.2, 47.2, 28.5)),
        ({"softmax_flops": 3, "vocab_matmuls": 0}, (405.1, 162.8, 83.1, 48.3, 28.7)),
        ({"is_causal": True}, (153.6, 79.2, 41.7, 24.8, 15.1)),
    ],
)
def test_variants_of_the_formula(changes, expected):
    convention = replace(REPORT, **changes)
    ratios = [ratio(NAMED_SHAPES[name], convention) for name in FIGURE_3]
    assert ratios == pytest.approx(expected, abs=0.051)


@pytest.mark.parametrize(
    ("window", "text", "small", "large"),
    [(522, 512, 289.0, 28.5), (532, 512, 283.2, 27.9), (512, 499, 287.6, 28.3)],
)
def test_variants_of_the_segment(window, text, small, large):
    assert ratio(NAMED_SHAPES["opt-125m"], REPORT, window, text) == pytest.approx(small, abs=0.051)
    assert ratio(NAMED_SHAPES["opt-175b"], REPORT, window, text) == pytest.approx(large, abs=0.051)


def test_absolute_flops_of_the_formula():
    comparison = compare_flops(NAMED_SHAPES["opt-125m"], TOKENS)
    assert comparison.full_attention.total == pytest.approx(1.61e17, rel=5e-3)
    assert comparison.recurrent.total == pytest.approx(5.46e14, rel=5e-3)


# billions of weights, as the models' cards or papers give them
WEIGHTS = {
    "opt-125m": 0.125, "opt-350m": 0.331, "opt-1.3b": 1.316, "opt-2.7b": 2.65, "opt-6.7b": 6.66,
    "opt-13b": 12.85, "opt-30b": 29.97, "opt-66b": 65.7, "opt-175b": 175, "gpt2": 0.124,
    "gpt2-medium": 0.355, "gpt2-large": 0.774, "gpt2-xl": 1.558, "bert-base": 0.110,
    "bert-large": 0.335, "llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-2-70b": 68.98,
    "llama-3-8b": 8.03, "llama-3-70b": 70.6, "llama-3.2-1b": 1.236, "llama-3.2-3b": 3.213,
}  # fmt: skip


def test_named_shapes_have_as_many_weights_as_the_models():
    found = {}
    for name, shape in NAMED_SHAPES.items():
        flops = forward_flops(shape, 1, replace(MATMULS, vocab_matmuls=1))
        # each weight of a product costs one multiply-add per token
        weights = (flops.total - flops.scores - flops.values) // 2
        if name.startswith(("llama-2", "llama-3-")):
            # their token embedding is not tied to the logits
            weights += shape.vocab_size * shape.embed_dim
        found[name] = weights / 1e9
    # positions, biases and norms are not in the count
    assert found == pytest.approx(WEIGHTS, rel=0.02)


def causal_decoder(shape, length):
    """A decoder that computes no masked score: each query meets the keys it sees."""
    d, e = shape.embed_dim, shape.embedding_dim
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    hidden = torch.randn(length, e) @ torch.randn(e, d)
    for _ in range(shape.num_layers):
        queries = (hidden @ torch.randn(d, heads * head_dim)).view(length, heads, head_dim)
        keys, values = (
            (hidden @ torch.randn(d, kv_heads * head_dim)).view(length, kv_heads, head_dim)
            for _ in range(2)
        )
        attended = torch.zeros(length, heads, head_dim)
        for query in range(length):
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = queries[query, None, head] @ keys[: query + 1, group].T
                attended[query, head] = scores.softmax(-1) @ values[: query + 1, group]
        hidden = hidden + attended.flatten(1) @ torch.randn(heads * head_dim, d)
        gate, up = (hidden @ torch.randn(d, shape.hidden_dim) for _ in range(2))
        hidden = hidden + (gate.sigmoid() * up) @ torch.randn(shape.hidden_dim, d)
    return hidden @ torch.randn(d, e) @ torch.randn(e, shape.vocab_size)


def test_honest_products_are_those_of_a_causal_decoder():
    assert forward_flops(TINY, 5, MATMULS).total == counted(causal_decoder, TINY, 5)


def test_knn_memory_costs_its_products():
    length, memory = 5, KnnMemoryConfig(layers=(0, 2), memory_size=23, top_k=4)
    heads, head_dim = TINY.num_heads, TINY.head_dim

    def read():
        queries = torch.randn(heads, length, head_dim)
        keys, values = torch.randn(2, heads, memory.memory_size, head_dim)
        found = (queries @ keys.transpose(1, 2)).topk(memory.top_k).indices
        head = torch.arange(heads)[:, None, None]
        scores = queries[:, :, None] @ keys[head, found].transpose(2, 3)
        return scores.softmax(-1) @ values[head, found]

    with_memory = forward_flops(TINY, length, MATMULS, knn_memory=memory)
    assert with_memory.search + with_memory.retrieved == len(memory.layers) * counted(read)
    assert with_memory.total - counted(causal_decoder, TINY, length) == 2 * counted(read)


FAMILIES = {
    "bert": {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 40},
    "gpt2": {"n_layer": 3, "n_embd": 24, "n_head": 4},
    "llama": {
        "num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 40,
        "num_key_value_heads": 2, "head_dim": 10,
    },
    "opt": {"num_hidden_layers": 3, "hidden_size": 24, "ffn_dim": 40, "word_embed_proj_dim": 12},
    "modernbert": {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 40},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_gives_the_products_of_the_model(family, tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    changes = {"num_attention_heads": 4, "vocab_size": 50} | FAMILIES[family]
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(family, **changes, **ids)
    config.save_pretrained(tmp_path)
    shape = shape_from_config(tmp_path / "config.json")
    kind, options = AutoModelForCausalLM, {}
    if shape.kind == "encoder":
        kind = AutoModel
        options = {"add_pooling_layer": False} if family == "bert" else {}
    model = kind.from_config(config, attn_implementation="eager", **options).eval()
    input_ids = torch.ones(1, 7, dtype=torch.long)
    # eager attention computes masked scores, too
    convention = replace(MATMULS, is_causal=False)
    found = counted(lambda: model(input_ids)) - forward_flops(shape, 7, convention).total
    # transformers 5.17 computes the angles of the rotation by a product of frequencies and places
    halves = {"llama": 10 // 2, "modernbert": 2 * 6 // 2}
    angles = 2 * 7 * halves.get(family, 0)
    assert found in (0, angles)


@given(
    tokens=st.integers(1, 5000),
    segment=st.integers(14, 600),
    num_memory_tokens=st.integers(0, 10),
    kind=st.sampled_from(["decoder", "encoder"]),
)
@settings(max_examples=50, deadline=None)
def test_segments_add_up(tokens, segment, num_memory_tokens, kind):
    shape = replace(TINY, kind=kind)
    slots = 2 * num_memory_tokens if kind == "decoder" else num_memory_tokens + 3
    text = segment if kind == "decoder" else segment - slots
    lengths = [min(text, tokens - start) for start in range(0, tokens, text)]
    total = sum(
        forward_flops(shape, length + slots, HONEST, num_outputs=length).total for length in lengths
    )
    comparison = compare_flops(
        shape, tokens, segment_length=segment, num_memory_tokens=num_memory_tokens,
        convention=HONEST,
    )  # fmt: skip
    assert comparison.recurrent.total == total
    assert comparison.num_segments == len(lengths)


@pytest.mark.parametrize("convention", [REPORT, HONEST], ids=lambda item: item.name)
def test_one_segment_without_memory_is_full_attention(convention):
    comparison = compare_flops(TINY, 300, segment_length=300, convention=convention)
    assert comparison.full_attention == comparison.recurrent
    assert comparison.ratio == 1


@pytest.mark.parametrize("convention", [REPORT, HONEST], ids=lambda item: item.name)
def test_ratio_grows_with_length_and_rmt_is_linear(convention):
    comparisons = [
        compare_flops(TINY, 64 * count, segment_length=64, convention=convention)
        for count in (1, 2, 4, 8, 16)
    ]
    ratios = [item.ratio for item in comparisons]
    assert ratios == sorted(set(ratios))
    first = comparisons[0].recurrent
    assert [item.recurrent for item in comparisons] == [first.times(n) for n in (1, 2, 4, 8, 16)]


def test_more_memory_costs_more():
    totals = [
        compare_flops(
            TINY, 1000, segment_length=100, convention=HONEST, num_memory_tokens=tokens,
            knn_memory=KnnMemoryConfig(layers=tuple(range(layers)), memory_size=size, top_k=top_k),
        ).recurrent.total
        for tokens, layers, size, top_k in [
            (0, 1, 8, 1), (1, 1, 8, 1), (1, 2, 8, 1), (1, 2, 9, 1), (1, 2, 9, 2),
        ]
    ]  # fmt: skip
    assert totals == sorted(set(totals))


def test_masked_scores_cost_nothing_in_a_decoder_only():
    encoder = replace(TINY, kind="encoder")
    assert forward_flops(TINY, 9, HONEST).scores * 2 * 9 == 10 * (
        forward_flops(encoder, 9, HONEST).scores
    )
    assert forward_flops(encoder, 9, HONEST).logits == 0
    assert forward_flops(TINY, 9, HONEST, num_outputs=4).logits * 9 == 4 * (
        forward_flops(TINY, 9, HONEST).logits
    )


def test_terms_are_the_total():
    comparison = compare_flops(TINY, 1000, convention=HONEST, num_memory_tokens=3)
    record = json.loads(json.dumps(comparison.to_dict()))
    for name in ("full_attention", "recurrent"):
        assert sum(record[f"{name}_terms"].values()) == record[f"{name}_flops"]
        assert record[f"{name}_flops_per_token"] * 1000 == record[f"{name}_flops"]
    flops = comparison.recurrent
    assert flops.without_vocabulary == flops.total - flops.embedding - flops.logits
    assert flops.plus(flops) == flops.times(2)
    assert Flops().total == 0


LLAMA = {
    "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "vocab_size": 128_256,
    "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    def write(config):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return folder / "config.json"

    return write


def test_config_equals_named_shape(written):
    path = written(LLAMA)
    assert shape_from_config(path) == replace(NAMED_SHAPES["llama-3.2-1b"], name="model")
    assert find_shape(str(path.parent)) == find_shape(str(path))
    assert find_shape("Llama-3.2-1B") == NAMED_SHAPES["llama-3.2-1b"]


def test_unknown_model_types_are_counted_when_their_kind_is_given(written):
    config = LLAMA | {"model_type": "mine"}
    with pytest.raises(DataError, match=r"model_type among .*, got 'mine'.*\"gated_mlp\""):
        shape_from_config(written(config))
    shape = shape_from_config(written(config | {"kind": "encoder", "gated_mlp": True}))
    assert (shape.kind, shape.gated_mlp) == ("encoder", True)


def test_a_sliding_window_is_ignored_aloud(written, caplog):
    shape = shape_from_config(written(LLAMA | {"sliding_window": 4096}))
    assert shape.num_layers == 16
    assert "sliding_window 4096: counted is attention to all" in caplog.text
    assert "local_attention" not in caplog.text
    shape_from_config(written(LLAMA | {"model_type": "modernbert", "local_attention": 128}))
    assert "local_attention 128: counted is attention to all" in caplog.text
    caplog.clear()
    shape_from_config(written(LLAMA | {"sliding_window": 4096, "use_sliding_window": False}))
    assert not caplog.records


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "hidden_size": None}, "embed_dim as hidden_size or n_embd or d_model or dim"),
        ({**LLAMA, "intermediate_size": None}, "hidden_dim as intermediate_size or ffn_dim"),
        ({**LLAMA, "hidden_size": "wide"}, "hidden_size must be a whole number, got 'wide'"),
        ({**LLAMA, "num_attention_heads": 0}, "num_heads must be at least 1, got 0"),
        ({**LLAMA, "num_key_value_heads": 5}, r"multiple of num_kv_heads \(5\), got 32"),
        ({**LLAMA, "num_attention_heads": 24}, r"multiple of num_heads \(24\), got 2048"),
        ({**LLAMA, "num_local_experts": 8}, "dense model, got num_local_experts 8"),
        ({**LLAMA, "is_encoder_decoder": True}, "encoder-decoder, whose cross-attention"),
        ([1], "must hold a JSON object, got list"),
    ],
)
def test_configs_that_cannot_be_counted_are_refused(written, config, message):
    with pytest.raises(DataError, match=message):
        shape_from_config(written(config))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"must hold a config\.json, and does not"):
        find_shape(str(tmp_path))


def test_files_that_are_no_json_are_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff{")
    with pytest.raises(DataError, match="must be a JSON file"):
        shape_from_config(path)
    with pytest.raises(ValueError, match=r"got 'opt-125'. Did you mean opt-125m\?"):
        find_shape("opt-125")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1 .* got 0 and 0"),
        ({"num_memory_tokens": -1, "convention": HONEST}, "got 64 and -1"),
        ({"num_memory_tokens": 2}, "count memory for 2 memory tokens, got 'report'"),
        ({"segment_length": 0}, "room for text beside 0 .* got 0. Raise it to at least 1"),
        (
            {"knn_memory": KnnMemoryConfig(layers=(0,), memory_size=64)},
            "count memory for a kNN memory, got 'report'",
        ),
        (
            {"knn_memory": KnnMemoryConfig(layers=(3,), memory_size=64), "convention": HONEST},
            r"among the 3 layers of tiny, got \[3\]",
        ),
    ],
)
def test_counts_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare_flops(TINY, **{"num_tokens": 64, **options})


def test_a_window_without_room_for_text_is_refused():
    encoder = NAMED_SHAPES["bert-base"]
    with pytest.raises(ValueError, match=r"13 memory and special tokens, got 13\. .* at least 14"):
        compare_flops(encoder, 9, segment_length=13, num_memory_tokens=10, convention=HONEST)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        forward_flops(encoder, 0)
    with pytest.raises(ValueError, match=r"between 0 and length \(4\), got 5"):
        forward_flops(encoder, 4, num_outputs=5)
    with pytest.raises(ValueError, match="softmax_flops must be at least 0, got -1"):
        replace(REPORT, softmax_flops=-1)
    with pytest.raises(ValueError, match="vocab_matmuls must be 0, 1, 2 or None, got 3"):
        FlopsConvention(**{**asdict(REPORT), "vocab_matmuls": 3})


def test_figure_shows_growth_over_one_segment(tmp_path, monkeypatch):
    kept = []

    @contextmanager
    def keep(path):
        with plots.figure_axes(path) as axes:
            kept.append(axes)
            yield axes

    monkeypatch.setattr(flops_plot, "figure_axes", keep)
    shapes = [NAMED_SHAPES[name] for name in FIGURE_3]
    curves = [[compare_flops(shape, 512 * count) for count in (1, 4, 4000)] for shape in shapes]
    path = plot_flops_growth(curves, tmp_path / "flops.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    *full, recurrent = kept[0].lines
    assert recurrent.get_ydata() == pytest.approx([1, 4, 4000])
    # the ratio of the figure is the distance of two of its lines
    assert full[0].get_ydata()[-1] / 4000 == pytest.approx(295.066, abs=1e-3)
    assert full[0].get_label() == "opt-125m (ratio 295.1)"
    with pytest.raises(ValueError, match="each beginning with a document of one segment"):
        plot_flops_growth([curves[0][1:]], path)

"""One memory layer equals the authors' code, and a reference written from the paper alone."""

import math
from pathlib import Path

import numpy as np
import pytest

from byheart.errors import DataError
from byheart.testing.parity import TOLERANCE, main
from byheart.testing.parity_layer import layer_difference

RECORDED = sorted((Path(__file__).parent / "data").glob("mt_layer_*.npz"))
BATCH, SEGMENT, HEADS, HEAD_DIM, EMBED_DIM, HIDDEN_DIM, TOP_K = 2, 5, 3, 4, 7, 11, 6
NUM_SEGMENTS = 8


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_layer_equals_the_authors_code(path):
    assert layer_difference(path) <= TOLERANCE


def test_all_recordings_are_there():
    assert len(RECORDED) == 3


# ---- the layer in loops: one row, one token, one head at a time


def root_mean_square_norm(x, weight):
    return x / math.sqrt(np.mean(x**2) + 1e-6) * weight


def unit_length(x):
    return x / math.sqrt(np.sum(x**2) + 1e-6)


def t5_bucket(distance):
    if distance < 16:
        return distance
    return min(31, 16 + int(math.log(distance / 16) / math.log(128 / 16) * 16))


def softmax_average(logits, values):
    weights = np.exp(np.array(logits) - max(logits))
    return weights @ np.array(values) / weights.sum()


def project(params, x):
    """Return query, key and value of one token, per head."""
    normed = root_mean_square_norm(x, params["tbase/_kvq/pre_attn_layernorm/scale"])
    query, key, value = (
        (normed @ params[f"tbase/_kvq/{name}_layer/kernel"]).reshape(HEADS, HEAD_DIM)
        for name in ("queries", "keys", "values")
    )
    return [*map(unit_length, query)], [*map(unit_length, key)], value


def read_memory(query, memory, head, scale):
    """Take the best entry of each strided bucket; a bucket without one gives zeros."""
    logits, values = [], []
    for bucket in range(TOP_K):
        entries = [entry for entry in memory[bucket::TOP_K] if entry is not None]
        if entries:
            key, value = max(entries, key=lambda entry: query @ entry[0][head])
            logits.append(query @ key[head] * scale)
            values.append(value[head])
        else:
            logits.append(0.0)
            values.append(np.zeros(HEAD_DIM))
    return softmax_average(logits, values)


def layer_output(params, x, tokens, place, memory):
    """Return the residual stream of one token; `tokens[place]` is its own query, key and value."""
    mixed = []
    for head in range(HEADS):
        query = tokens[place][0][head]
        scale = abs(params["tbase/_kvq/attention_scale"][head])
        logits, values = [], []
        for distance in range(1, SEGMENT + 1):
            _, key, value = tokens[place - distance]
            bias = params["relative_positions/rel_embedding"][head, t5_bucket(distance)]
            logits.append((query @ key[head] + bias) * scale)
            values.append(value[head])
        gate = 1 / (1 + math.exp(-params["external_memory_bias"][head]))
        local = softmax_average(logits, values)
        mixed.append(gate * read_memory(query, memory, head, scale) + (1 - gate) * local)
    x = x + np.concatenate(mixed) @ params["tbase/post_attn_mlp/output_layer/kernel"]
    inner = root_mean_square_norm(x, params["tbase/pre_ffn_layernorm/scale"])
    inner = np.maximum(inner @ params["tbase/ffn/hidden0/kernel"], 0)
    return x + inner @ params["tbase/ffn/output_layer/kernel"]


def reference_outputs(params, x, starts, memory_size):
    y = np.zeros_like(x)
    nothing = np.zeros((3, HEADS, HEAD_DIM))
    for row in range(BATCH):
        for segment in range(NUM_SEGMENTS):
            if starts[segment, row]:
                cache, memory, num_written = [nothing] * SEGMENT, [None] * memory_size, 0
            tokens = cache + [project(params, token) for token in x[segment, row]]
            for i in range(SEGMENT):
                y[segment, row, i] = layer_output(
                    params, x[segment, row, i], tokens, SEGMENT + i, memory
                )
            cache = tokens[SEGMENT:]
            for _, key, value in cache:
                memory[num_written % memory_size] = (key, value)
                num_written += 1
    return y


def recording(memory_size=18, seed=0):
    """Make a file of other dimensions than the recorded ones, over and again past its memory."""
    random = np.random.default_rng(seed)
    shapes = {
        "external_memory_bias": (HEADS,),
        "relative_positions/rel_embedding": (HEADS, 32),
        "tbase/_kvq/attention_scale": (HEADS,),
        "tbase/_kvq/pre_attn_layernorm/scale": (EMBED_DIM,),
        "tbase/_kvq/queries_layer/kernel": (EMBED_DIM, HEADS * HEAD_DIM),
        "tbase/_kvq/keys_layer/kernel": (EMBED_DIM, HEADS * HEAD_DIM),
        "tbase/_kvq/values_layer/kernel": (EMBED_DIM, HEADS * HEAD_DIM),
        "tbase/post_attn_mlp/output_layer/kernel": (HEADS * HEAD_DIM, EMBED_DIM),
        "tbase/pre_ffn_layernorm/scale": (EMBED_DIM,),
        "tbase/ffn/hidden0/kernel": (EMBED_DIM, HIDDEN_DIM),
        "tbase/ffn/output_layer/kernel": (HIDDEN_DIM, EMBED_DIM),
    }
    params = {name: random.normal(size=shape) for name, shape in shapes.items()}
    # the sign is dropped by the layer
    params["tbase/_kvq/attention_scale"] *= 5
    x = random.normal(size=(NUM_SEGMENTS, BATCH, SEGMENT, EMBED_DIM))
    starts = np.zeros((NUM_SEGMENTS, BATCH), dtype=bool)
    starts[0] = starts[2, 1] = starts[7, 0] = True
    y = reference_outputs(params, x, starts, memory_size)
    dims = [BATCH, SEGMENT, HEADS, HEAD_DIM, EMBED_DIM, HIDDEN_DIM, memory_size, TOP_K]
    arrays = {"x": x, "y": y, **{f"params/{name}": value for name, value in params.items()}}
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    return {**arrays, "start_of_document": starts, "dims": np.array(dims)}


@pytest.fixture(scope="module")
def arrays():
    return recording()


def save(directory, arrays):
    path = directory / "mt_layer.npz"
    np.savez(path, **arrays)
    return path


# 30 divides by the segment, 18 does not; 6 is dense retrieval
@pytest.mark.parametrize("memory_size", [6, 18, 30])
def test_layer_equals_the_reference_at_other_dimensions(tmp_path, memory_size):
    path = save(tmp_path, recording(memory_size, seed=memory_size))
    assert layer_difference(path) <= TOLERANCE


def test_a_recording_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=r"missing does not exist\. Name a recording: a directory"):
        layer_difference(tmp_path / "missing")


@pytest.mark.parametrize(
    "changed", ["y", "x", "params/external_memory_bias", "params/tbase/_kvq/attention_scale"]
)
def test_a_changed_number_is_seen(tmp_path, arrays, changed):
    values = arrays[changed].copy()
    values.flat[-1] += 0.01
    assert layer_difference(save(tmp_path, {**arrays, changed: values})) > TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": None}, "lacks the array dims"),
        ({"dims": np.array([1, 2, 3])}, r"eight whole numbers B, S, H, D, E, F, M, k, got \[1, 2"),
        ({"x": None}, "lacks the array x"),
        ({"params/tbase/ffn/hidden0/kernel": None}, "lacks the array params/tbase/ffn/hidden0"),
        (
            {"y": np.zeros((8, 2, 5, 6), np.float32)},
            r"y in .* shape \[8, 2, 5, 7\].*\[8, 2, 5, 6\]",
        ),
        ({"x": np.zeros((0, 2, 5, 7), np.float32)}, r"x in .* must have the shape \[1, 2, 5, 7\]"),
        ({"start_of_document": np.zeros((8, 2))}, "must be true or false, got float64"),
        ({"params/extra": np.zeros(3, np.float32)}, "has the parameter params/extra, which"),
        ({"dims": np.array([2, 5, 3, 4, 7, 11, 17, 6])}, "num_buckets must divide memory_size"),
    ],
)
def test_a_file_of_another_layout_is_refused(tmp_path, arrays, changes, message):
    changed = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        layer_difference(save(tmp_path, changed))


def test_what_is_no_recording_is_refused(tmp_path):
    text = tmp_path / "notes.npz"
    text.write_text("not an archive")
    with pytest.raises(DataError, match=r"must be an \.npz file of named arrays"):
        layer_difference(text)
    with pytest.raises(DataError, match=r"npz does not exist\. Name"):
        layer_difference(tmp_path / "missing.npz")


def test_command_reports_every_file_and_fails_if_one_differs(tmp_path, arrays, capsys):
    assert main([str(path) for path in RECORDED]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("agrees") for line in lines] == [True] * 3

    wrong = save(tmp_path, {**arrays, "y": arrays["y"] + np.float32(0.5)})
    assert main([str(wrong), str(tmp_path), str(RECORDED[0])]) == 1
    captured = capsys.readouterr()
    assert "largest difference 5.0e-01, DIFFERS" in captured.out
    assert captured.out.splitlines()[1].endswith("agrees")
    assert "expected.safetensors cannot be read" in captured.err


def test_command_fails_on_nan(tmp_path, arrays):
    assert main([str(save(tmp_path, {**arrays, "y": arrays["y"] * np.float32("nan")}))]) == 1

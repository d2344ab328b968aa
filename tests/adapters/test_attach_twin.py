"""What a memory layer of a pretrained model computes, written out from its projections."""

import pytest
import torch

from byheart import KnnMemoryConfig
from byheart.adapters.attach import attach
from byheart.ops.positions import apply_rope, rope_angles

SEGMENT, ROWS, HEADS, KV_HEADS, HEAD_DIM, LAYER = 7, 2, 4, 2, 4, 1


def split(projected, heads):
    return projected.view(*projected.shape[:2], heads, HEAD_DIM).transpose(1, 2)


def rotated(vectors, places):
    cos, sin = rope_angles(places, HEAD_DIM)
    return apply_rope(vectors, cos, sin)


def unit(vectors):
    return vectors / (vectors.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def slow(attention, memory, inputs, config):
    """Return the layer's output over the last of some segments, whose others are its memory.

    One query, head and row at a time: rotary attention over the segment, softmax attention over
    keys of the other segments without positions, and the gate between them, or one softmax.
    """
    *before, last = inputs
    queries, keys, values = (
        split(side(last), heads)
        for side, heads in (
            (attention.q_proj, HEADS), (attention.k_proj, KV_HEADS), (attention.v_proj, KV_HEADS),
        )
    )  # fmt: skip
    past = torch.cat(before, dim=1)
    old_keys, old_values = (
        split(side(past), KV_HEADS) for side in (attention.k_proj, attention.v_proj)
    )
    places = torch.arange(SEGMENT)
    mixed = torch.zeros(ROWS, SEGMENT, HEADS, HEAD_DIM)
    for row in range(ROWS):
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            turned = rotated(queries[row, head], places)
            near = rotated(keys[row, group], places)
            for t in range(SEGMENT):
                scores = near[: t + 1] @ turned[t] * HEAD_DIM**-0.5
                asked = {
                    "none": queries[row, head, t],
                    "local": turned[t],
                    "window": rotated(queries[row, head, t][None], torch.tensor([SEGMENT]))[0],
                }[config.memory_position]
                stored = old_keys[row, group]
                if config.normalize_qk:
                    asked, stored = unit(asked), unit(stored)
                far = stored @ asked * memory.log_scale[head].exp()
                near_values, far_values = values[row, group, : t + 1], old_values[row, group]
                logit = memory.gate_bias[head]
                if config.knn.combine == "joint":
                    weights = torch.cat([scores, far + logit]).softmax(0)
                    mixed[row, t, head] = weights @ torch.cat([near_values, far_values])
                    continue
                local, found = scores.softmax(0) @ near_values, far.softmax(0) @ far_values
                if memory.gate_weight is not None:
                    logit = logit + memory.gate_weight[head] @ asked
                gate = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "linear": lambda x: x}[
                    config.gate
                ](logit)
                mixed[row, t, head] = (1 - gate) * local + gate * found
    return attention.o_proj(mixed.flatten(2))


OPTIONS = (
    {},
    {"gate": "linear"},
    {"gate": "sigmoid"},
    {"memory_position": "local"},
    {"memory_position": "window"},
    {"normalize_qk": True},
    {"normalize_qk": True, "memory_position": "window"},
)


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "combine"),
    [
        (options, combine)
        for options in OPTIONS
        for combine in ("gate", "content_gate", "joint")
        if combine != "joint" or "gate" not in options
    ],
    ids=str,
)
def test_a_memory_layer_equals_its_slow_twin(options, combine, tiny_model, draw):
    model = tiny_model("llama")
    knn = KnnMemoryConfig(layers=(LAYER,), memory_size=32, top_k=32, combine=combine)
    memory_model = attach(model, knn=knn, segment_length=SEGMENT, **options).eval()
    torch.manual_seed(3)
    for weight in memory_model.memory_parameters():
        weight.add_(0.5 * torch.randn_like(weight))
    attention, seen = model.model.layers[LAYER].self_attn, []
    attention.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])),
        with_kwargs=True,
    )
    state = memory_model.new_state(ROWS)
    for step in range(3):
        out = memory_model(draw(ROWS, SEGMENT, seed=step), state=state)
        state = state.commit(out.new_entries)
    (memory,) = memory_model.memories().values()
    inputs, outputs = zip(*seen, strict=True)
    expected = slow(attention, memory, inputs, memory_model.memory_config)
    torch.testing.assert_close(outputs[-1], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_yarn_counts_once_where_queries_are_rotated(tiny_model):
    rope = {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    scales = []
    for position in ("none", "local", "window"):
        knn = KnnMemoryConfig(layers=(LAYER,), memory_size=32, top_k=5)
        memory_model = attach(
            tiny_model("llama", rope_parameters=rope), knn=knn, segment_length=SEGMENT,
            memory_position=position,
        )  # fmt: skip
        (memory,) = memory_model.memories().values()
        scales.append(memory.log_scale[0].exp().item())
    assert scales[1] == scales[2]
    assert scales[0] / scales[1] == pytest.approx(scales[1] / 0.5)

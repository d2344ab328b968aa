"""Memory on pretrained decoders: the model is what it was until a gate opens."""

import copy
import math

import pytest
import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from byheart import KnnMemoryConfig, read_tokens
from byheart.adapters.attach import attach
from byheart.ops import known

SEGMENT, MEMORY_SIZE, ROWS = 7, 17, 3


def knn(layers=(1,), **changes):
    return KnnMemoryConfig(**{"layers": layers, "memory_size": MEMORY_SIZE, "top_k": 5, **changes})


@pytest.mark.parametrize(
    ("implementation", "padding"), [("sdpa", "none"), ("sdpa", "left"), ("eager", "right")]
)
def test_closed_gates_leave_the_model_as_it_was(attachable, implementation, padding, draw):
    if attachable.name in ("gemma2", "gpt_oss") and implementation == "sdpa":
        implementation = "eager"  # it has no other
    model = attachable.build(attn_implementation=implementation)
    before = copy.deepcopy(model)
    memory_model = attach(model, knn=knn(), segment_length=SEGMENT)
    state = memory_model.new_state(ROWS)
    columns, lengths = torch.arange(SEGMENT), torch.tensor([SEGMENT, 4, 6])
    padded = None
    if padding == "left":
        padded = (columns >= SEGMENT - lengths[:, None]).long()
    elif padding == "right":
        padded = (columns < lengths[:, None]).long()
    # with the first document over, four segments of which the last meets a ring that has gone round
    for step in range(5):
        ids = draw(ROWS, SEGMENT, seed=step)
        mask = padded if step in (0, 4) else None
        # what is padded ends there; a row that is not may begin again, or go on
        start = torch.tensor([step == 1 and padding == "none", step == 1, step == 1])
        with torch.no_grad():
            out = memory_model(ids, attention_mask=mask, state=state, document_start=start)
            places = {}
            if attachable.name == "gpt2" and padding == "left" and mask is not None:
                # by itself it would count the padding
                places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            expected = before(ids, attention_mask=mask, **places).logits
        if attachable.name == "opt" and padding == "left" and mask is not None:
            # where padding stands is nobody's business
            assert torch.equal(out.logits[mask.bool()], expected[mask.bool()])
        else:
            assert torch.equal(out.logits, expected)
        if step < 4:
            state = state.commit(out.new_entries)
    first = 3 if padding == "none" else 4
    assert state.stores[1].num_written.tolist() == [n * SEGMENT for n in (first, 3, 3)]
    assert 3 * SEGMENT > MEMORY_SIZE
    for memory in memory_model.memories().values():
        torch.nn.init.constant_(memory.gate_bias, 0.5)
    opened = memory_model(ids, attention_mask=padded, state=state)
    real = torch.ones(ROWS, SEGMENT, dtype=torch.bool) if padded is None else padded.bool()
    for row in range(ROWS):
        assert not torch.allclose(opened.logits[row][real[row]], expected[row][real[row]])


def test_detach_leaves_no_trace(attachable, draw):
    model = attachable.build()
    before = copy.deepcopy(model)
    memory_model = attach(model, knn=knn(), segment_length=SEGMENT, xl_cache_length=SEGMENT)
    out = memory_model(draw(1, SEGMENT), labels=draw(1, SEGMENT))
    out.loss.backward()
    memory_model.generate(draw(1, 3), max_new_tokens=2, state=memory_model.new_state(1))
    memory_model.zero_grad()
    detached = memory_model.detach()
    assert detached is model
    ids = draw(2, 9)
    assert torch.equal(model(ids).logits, before(ids).logits)
    now, then = model.state_dict(), before.state_dict()
    assert list(now) == list(then)
    assert all(torch.equal(now[name], tensor) for name, tensor in then.items())
    assert model.config.to_dict() == before.config.to_dict()
    for mine, theirs in zip(model.modules(), before.modules(), strict=True):
        assert type(mine) is type(theirs)
        assert not mine._forward_pre_hooks
        assert vars(mine).keys() == vars(theirs).keys()


def test_the_layer_around_an_attention_is_found(attachable):
    model = attachable.build()
    memory_model = attach(model, knn=knn(), segment_length=SEGMENT)
    block = memory_model.layers.block_of(model, 1)
    names = [name for name, module in model.named_modules() if module is block]
    assert [name.rpartition(".")[2] for name in names] == ["1"]
    inside = {id(weight) for weight in block.parameters()}
    assert {id(weight) for weight in memory_model.memory_parameters()} < inside
    other = memory_model.layers.block_of(model, 0)
    assert not inside & {id(weight) for weight in other.parameters()}
    assert len(inside) == len(list(other.parameters())) + 2  # scale and gate


def opened(model, *, memory=True, **options):
    """Attach a memory whose gates are open and different."""
    knn_memory = knn(**options.pop("knn", {})) if memory else None
    memory_model = attach(model, knn=knn_memory, **{"segment_length": SEGMENT, **options})
    torch.manual_seed(3)
    for weight in memory_model.memory_parameters():
        with torch.no_grad():
            weight.add_(0.5 * torch.randn_like(weight))
    return memory_model.eval()


@pytest.mark.parametrize("cache", [0, 4])
def test_it_does_not_matter_how_a_document_is_cut(attachable, cache, draw):
    memory_model = opened(attachable.build(), xl_cache_length=cache)
    ids = draw(2, 41)
    whole = read_tokens(memory_model, ids, memory_model.new_state(2), return_logits=True)
    state, logits = memory_model.new_state(2), []
    for piece in ids.split([1, 3, 11, 2, 24], dim=1):
        read = read_tokens(memory_model, piece, state, return_logits=True)
        state = read.state
        logits.append(read.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [0, SEGMENT])
def test_a_row_is_what_it_is_alone(attachable, cache, draw):
    memory_model = opened(attachable.build(), xl_cache_length=cache)
    ids, lengths = draw(3, 37), torch.tensor([37, 5, 23])
    together = read_tokens(
        memory_model, ids, memory_model.new_state(3), num_tokens=lengths, return_logits=True
    )
    for row, length in enumerate(lengths.tolist()):
        one = ids[row : row + 1, :length]
        alone = read_tokens(memory_model, one, memory_model.new_state(1), return_logits=True)
        mine = together.logits[row : row + 1, :length]
        torch.testing.assert_close(mine, alone.logits, atol=2e-5, rtol=1e-5)


def test_without_document_start_all_rows_go_on(tiny_model, draw):
    memory_model = opened(tiny_model("llama"), xl_cache_length=SEGMENT)
    read = read_tokens(memory_model, draw(2, 2 * SEGMENT), memory_model.new_state(2)).state
    ids = draw(2, SEGMENT, seed=2)
    left_out = memory_model(ids, state=read.fork())
    for starts, goes_on in (([False, False], [True, True]), ([False, True], [True, False])):
        told = memory_model(ids, state=read.fork(), document_start=torch.tensor(starts))
        same = [torch.equal(told.logits[row], left_out.logits[row]) for row in range(2)]
        assert same == goes_on
    assert not left_out.new_entries.document_start.any()


def test_an_xl_cache_is_full_attention_over_both_segments(attachable, draw):
    model = attachable.build()
    ids = draw(2, 2 * SEGMENT)
    expected = model(ids).logits
    memory_model = opened(model, memory=False, xl_cache_length=SEGMENT)
    read = read_tokens(memory_model, ids, memory_model.new_state(2), return_logits=True)
    # sums of float32 in another order, of logits of up to 4.5: 2.9e-6 in glm, 2.6e-6 in qwen3; in
    # float64 they are equal as far as the float32 parts of the models are
    most = 2e-6 * min(2.0, max(1.0, float(expected.detach().abs().max())))
    torch.testing.assert_close(read.logits, expected, atol=most, rtol=0)
    third = read_tokens(memory_model, ids[:, :1], read.state, return_logits=True)
    assert torch.isfinite(third.logits).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 3, 9, 64])
def test_a_sliding_window_reaches_into_the_xl_cache(implementation, window, tiny_model, draw):
    model = tiny_model("mistral", sliding_window=window, attn_implementation=implementation)
    ids = draw(2, 2 * SEGMENT)
    expected = model(ids).logits
    memory_model = opened(model, memory=False, xl_cache_length=SEGMENT)
    for cuts in ([14], [3, 8, 3]):
        state, logits = memory_model.new_state(2), []
        for piece in ids.split(cuts, dim=1):
            read = read_tokens(memory_model, piece, state, return_logits=True)
            state = read.state
            logits.append(read.logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_joint_softmax_over_all_of_the_past_is_full_attention(implementation, tiny_model, draw):
    # positions are added to the embeddings, so keys in memory stand where they stood; the XL
    # cache makes them go on, and with write="evicted" what leaves it enters the memory
    model = tiny_model("gpt2", attn_implementation=implementation)
    ids = draw(2, 4 * SEGMENT)
    expected = model(ids).logits
    everything = KnnMemoryConfig(
        layers=(0, 1), memory_size=64, top_k=64, combine="joint", write="evicted"
    )
    memory_model = attach(
        model, knn=everything, segment_length=SEGMENT, xl_cache_length=SEGMENT, gate_init=0.0
    )
    read = read_tokens(memory_model, ids, memory_model.new_state(2), return_logits=True)
    torch.testing.assert_close(read.logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["none", "local"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_joint_softmax_of_rotary_models_is_full_attention_at_one_place(
    name, position, tiny_model, draw
):
    # in segments of one token all of the past is memory, and both queries and keys stand at 0
    model = tiny_model(name)
    ids = draw(2, 29)
    expected = model(ids, position_ids=torch.zeros_like(ids)).logits
    everything = KnnMemoryConfig(layers=(0, 1), memory_size=31, top_k=31, combine="joint")
    memory_model = attach(model, knn=everything, segment_length=1, memory_position=position)
    read = read_tokens(memory_model, ids, memory_model.new_state(2), return_logits=True)
    # float32 sums in another order, 28 times: the most is 3.4e-6 (qwen3)
    torch.testing.assert_close(read.logits, expected, atol=5e-6, rtol=0)


def test_layers_are_named_by_number_or_module(tiny_model):
    names = ["model.layers.1.self_attn"]
    by_name = attach(tiny_model("llama"), knn=knn((0,)), layers=names, segment_length=SEGMENT)
    by_number = attach(tiny_model("llama"), knn=knn((1,)), segment_length=SEGMENT)
    from_the_end = attach(tiny_model("llama"), knn=knn((-1,)), segment_length=SEGMENT)
    assert by_name.memory_config == by_number.memory_config == from_the_end.memory_config
    assert list(by_name.memories()) == [1]


def test_a_bfloat16_store_is_read_as_exact_as_its_entries(tiny_model, draw):
    ids, read = draw(2, 5 * SEGMENT), {}
    for dtype in ("float32", "bfloat16"):
        memory_model = opened(tiny_model("llama"), knn={"dtype": dtype}, xl_cache_length=SEGMENT)
        state = memory_model.new_state(2)
        assert state.stores[1].keys.dtype == getattr(torch, dtype)
        read[dtype] = read_tokens(memory_model, ids, state, return_logits=True).logits
    # 8 bits of each number are kept
    torch.testing.assert_close(read["bfloat16"], read["float32"], atol=0.1, rtol=0)
    before = slice(0, SEGMENT)  # without memory
    assert torch.equal(read["bfloat16"][:, before], read["float32"][:, before])
    assert not torch.equal(read["bfloat16"], read["float32"])


def test_layers_of_both_kinds_are_read(tiny_model):
    for name, rotating in (("smollm3", (0,)), ("cohere2", (0,)), ("gemma3", (0, 1))):
        memory_model = attach(tiny_model(name), knn=knn(), segment_length=SEGMENT)
        hooks = memory_model.layers.hooks
        assert tuple(i for i, hook in enumerate(hooks) if hook.rotation is not None) == rotating
    first, second = (hook.rotation.source for hook in hooks)
    assert first is not second or name != "gemma3"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(name, reentrant, tiny_model, draw):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(name)
        memory_model = opened(model, xl_cache_length=SEGMENT).train()
        if checkpointing:
            # the first name is new in transformers 5.18 or later, the second goes with 6
            names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            enable = next(getattr(model, name) for name in names if hasattr(model, name))
            enable({"use_reentrant": reentrant})
        state = memory_model.new_state(2)
        for step in range(3):
            ids = draw(2, SEGMENT, seed=step)
            out = memory_model(ids, labels=ids, state=state)
            out.loss.backward()
            state = state.commit(out.new_entries)
        gradients.append([weight.grad for weight in memory_model.parameters()])
        assert state.stores[1].num_written.tolist() == [3 * SEGMENT] * 2
    assert all(map(torch.equal, *gradients))
    assert all(weight.grad.abs().sum() > 0 for weight in memory_model.memory_parameters())


@pytest.mark.parametrize("gate", ["tanh", "linear"])
@pytest.mark.parametrize("combine", ["gate", "content_gate"])
def test_closed_gates_have_a_gradient(gate, combine, tiny_model, draw):
    memory_model = attach(
        tiny_model("llama"), knn=knn(combine=combine), segment_length=SEGMENT, gate=gate
    )
    state = memory_model.new_state(2)
    out = memory_model(draw(2, SEGMENT), state=state)
    state = state.commit(out.new_entries)
    ids = draw(2, SEGMENT, seed=2)
    memory_model(ids, labels=ids, state=state).loss.backward()
    memory = memory_model.memories()[1]
    assert (memory.gate_bias.grad != 0).all()
    if combine == "content_gate":
        assert (memory.gate_weight.grad != 0).all()


@pytest.mark.parametrize("options", [{}, {"xl_cache_length": 7}])
def test_padding_on_the_left_is_as_good_as_on_the_right(attachable, options, draw):
    assert_sides_are_equal(opened(attachable.build(), **options), draw)


@pytest.mark.parametrize("position", ["local", "window"])
@pytest.mark.parametrize("name", ["llama", "phi", "gemma3", "smollm3", "cohere2"])
def test_searched_from_a_place_the_side_of_the_padding_is_the_same(
    name, position, tiny_model, draw
):
    assert_sides_are_equal(opened(tiny_model(name), memory_position=position), draw)


def assert_sides_are_equal(memory_model, draw):
    """Read a segment in two passes whose rows are padded on the left, and on the right."""
    ids, other = draw(2, SEGMENT), draw(2, SEGMENT, seed=5)
    read = read_tokens(memory_model, other, memory_model.new_state(2)).state
    states = [read.fork(), read.fork()]
    lengths = torch.tensor([4, 6])
    for _ in range(2):
        left = torch.zeros_like(ids)
        for row, length in enumerate(lengths.tolist()):
            left[row, SEGMENT - length :] = ids[row, :length]
        mask = torch.arange(SEGMENT) >= SEGMENT - lengths[:, None]
        mine = memory_model(left, attention_mask=mask, state=states[0])
        theirs = memory_model(ids, num_tokens=lengths, state=states[1])
        for row, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(
                mine.logits[row, SEGMENT - length :], theirs.logits[row, :length],
                atol=2e-5, rtol=1e-5,
            )  # fmt: skip
        states = [
            state.commit(out.new_entries) for state, out in zip(states, (mine, theirs), strict=True)
        ]
        lengths = SEGMENT - lengths  # the rest of the segment: 3 and 1


@pytest.mark.parametrize(
    ("config", "model", "window"),
    [
        ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {"layer_types": ["sliding_attention"] * 2}),
        ("PhimoeConfig", "PhimoeForCausalLM", {}),
    ],
)
def test_windows_that_are_in_the_mask_alone_reach_into_the_past(config, model, window, draw):
    torch.manual_seed(0)
    settings = getattr(transformers, config)(
        vocab_size=43, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=8, use_sliding_window=True, **window,
    )  # fmt: skip
    model = getattr(transformers, model)(settings).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.ndim > 1 else None
    ids = draw(2, 2 * SEGMENT)
    expected = model(ids).logits
    memory_model = opened(model, memory=False, xl_cache_length=SEGMENT)
    read = read_tokens(memory_model, ids, memory_model.new_state(2), return_logits=True)
    torch.testing.assert_close(read.logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_may_change_after_attaching(dtype, implementation, tiny_model, draw):
    models = [tiny_model("llama", attn_implementation=implementation) for _ in range(2)]
    memory_model = opened(models[0], xl_cache_length=SEGMENT).to(dtype)
    direct = opened(models[1].to(dtype), xl_cache_length=SEGMENT)
    for mine, theirs in zip(
        memory_model.memory_parameters(), direct.memory_parameters(), strict=True
    ):
        mine.data = theirs.data
    ids = draw(1, 20)
    mine, theirs = (
        read_tokens(m, ids, m.new_state(1), return_logits=True) for m in (memory_model, direct)
    )
    assert torch.equal(mine.logits, theirs.logits)


def test_yarn_and_memory_have_scores_of_one_size(tiny_model, draw):
    rope = {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    memory_model = attach(
        tiny_model("llama", rope_parameters=rope), knn=knn(), segment_length=SEGMENT
    )
    (memory,) = memory_model.memories().values()
    stretch = 0.1 * math.log(4) + 1
    torch.testing.assert_close(memory.log_scale.exp(), torch.full((4,), 0.5 * stretch**2))


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize(
    "rows",
    [{}, {"num_tokens": torch.tensor([7, 7])}, {"attention_mask": torch.ones(2, 7)}],
    ids=str,
)
def test_another_attention_of_the_model_is_used_for_whole_segments(
    rows, is_known, tiny_model, draw, monkeypatch
):
    # a name that makes no mask of columns, as flash and flex attention have none
    name = "sdpa_by_another_name"
    ALL_ATTENTION_FUNCTIONS.register(name, ALL_ATTENTION_FUNCTIONS["sdpa"])
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, lambda **_: None)
    model = tiny_model("llama", attn_implementation=name)
    ids = draw(2, SEGMENT)
    expected = model(ids).logits
    memory_model = attach(model, knn=knn(), segment_length=SEGMENT)
    state = memory_model.new_state(2)
    with monkeypatch.context() as patch:
        if not is_known:
            patch.setattr(known, "values_are_known", lambda _: False)
        for _ in range(2):
            out = memory_model(ids, state=state, **rows)
            assert torch.equal(out.logits, expected)
            state = state.commit(out.new_entries)
    with pytest.raises(ValueError, match="needs the attention 'sdpa' or 'eager', got 'sdpa_by"):
        read_tokens(memory_model, draw(2, 4), read_tokens(memory_model, ids[:, :3], state).state)


@pytest.mark.slow
# transformers may run it without torch.compile, which says so
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_flex_attention_reads_whole_segments(name, tiny_model, draw):
    # its kernels need heads of 16 numbers
    flex, plain = (
        tiny_model(name, attn_implementation=implementation, head_dim=16)
        for implementation in ("flex_attention", "eager")
    )
    ids = draw(2, 16)
    expected = flex(ids, use_cache=False).logits
    closed = attach(flex, knn=knn(), segment_length=16)
    state = closed.new_state(2)
    for _ in range(3):
        out = closed(ids, state=state)
        torch.testing.assert_close(out.logits, expected, atol=2e-6, rtol=0)
        state = state.commit(out.new_entries)
    logits = []
    for memory_model in (closed, attach(plain, knn=knn(), segment_length=16)):
        for memory in memory_model.memories().values():
            torch.nn.init.constant_(memory.gate_bias, 0.5)
        state = memory_model.new_state(2)
        for _ in range(3):
            out = memory_model(ids, state=state)
            state = state.commit(out.new_entries)
        logits.append(out.logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logits[0], expected, atol=1e-2)


@pytest.mark.parametrize("with_memory", [False, True])
def test_what_was_taken_off_is_not_used_on(with_memory, tiny_model, draw, tmp_path):
    memory = knn() if with_memory else None
    memory_model = attach(tiny_model("llama"), knn=memory, segment_length=SEGMENT)
    state = memory_model.new_state(1)
    # a memory of its own changes nothing for the one that was taken off
    attach(memory_model.detach(), knn=memory, segment_length=SEGMENT)
    for use in (
        lambda: memory_model(draw(1, 3)),
        lambda: memory_model(draw(1, 3), state=state),
        lambda: memory_model.generate(draw(1, 3), max_new_tokens=2),
        lambda: memory_model.generate(draw(1, 3), state=state, max_new_tokens=2),
        lambda: memory_model.save_pretrained(tmp_path / "memory"),
        lambda: memory_model.save_state(state, tmp_path / "state"),
        memory_model.memory_parameters,
        memory_model.memory_metrics,
        lambda: memory_model.new_state(1),
    ):
        with pytest.raises(ValueError, match=r"memory was taken off .* with detach\(\)\. Put it"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("combine", ["gate", "content_gate"])
def test_closed_gates_lose_no_bit_of_any_precision(combine, dtype, tiny_model, draw):
    model = tiny_model("llama").to(dtype)
    ids = draw(ROWS, SEGMENT)
    expected = model(ids, use_cache=False).logits
    memory_model = attach(model, knn=knn(combine=combine), segment_length=SEGMENT)
    state = memory_model.new_state(ROWS)
    for _ in range(3):
        out = memory_model(ids, state=state)
        assert torch.equal(out.logits, expected)
        state = state.commit(out.new_entries)

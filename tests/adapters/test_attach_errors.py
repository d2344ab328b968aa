"""What cannot have a memory, or not this one, is refused before anything is changed."""

import math

import pytest
import torch
import transformers
from transformers import GenerationConfig

import byheart
from byheart import KnnMemoryConfig, read_tokens
from byheart.adapters.attach import attach
from byheart.errors import MemoryStateError

SEGMENT = 7


def knn(layers=(1,), **changes):
    return KnnMemoryConfig(**{"layers": layers, "memory_size": 17, "top_k": 5, **changes})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"knn": None, "layers": ("x",)}, "layers are for a kNN memory"),
        ("llama", {"knn": knn((2,))}, r"knn.layers must be between 0 and 1.*got 2"),
        ("llama", {"knn": knn((-3,))}, r"or count from the end between -2 and -1, got -3"),
        (
            "llama",
            {"knn": knn((-1, 1))},
            r"knn.layers must name each .* once, got \(-1, 1\), .*\(1,",
        ),
        ("llama", {"knn": knn((0, 0))}, r"name each layer once, got \(0, 0\), which are \(0, 0\)"),
        ("llama", {"knn": knn(), "layers": ("model.layers.0",)}, r"such as 'model.layers.1.self_"),
        ("llama", {"knn": knn(), "segment_length": 60, "xl_cache_length": 5}, "64 positions"),
        ("llama", {"knn": knn(), "segment_length": 0}, "segment_length must be a whole number"),
        ("llama", {"knn": knn(), "xl_cache_length": -1}, "xl_cache_length must be .* least 0, got"),
        ("llama", {"knn": knn(), "scale_init": 0.0}, "scale_init must be above 0"),
        (
            "llama",
            {"knn": knn(), "scale_init": math.inf},
            "scale_init must be a finite number, got inf",
        ),
        (
            "llama",
            {"knn": knn(), "gate_init": math.nan},
            "gate_init must be a finite number, got nan",
        ),
        ("llama", {"gate": "linear"}, "gate has no effect without a kNN memory. Pass knn"),
        ("llama", {"memory_position": "local"}, "memory_position has no effect without"),
        ("llama", {"normalize_qk": True}, "normalize_qk has no effect without"),
        ("llama", {"scale_init": 3.0}, "scale_init has no effect without"),
        ("llama", {"knn": knn(combine="joint"), "gate": "sigmoid"}, "gate has no effect with comb"),
        ("llama", {"knn": knn(), "layers": "model.layers.1.self_attn"}, "must be a list of names"),
        ("gpt2", {"knn": knn(), "memory_position": "local"}, "rotary positions, which gpt2"),
        ("gemma2", {"knn": knn(combine="joint")}, "gemma2 caps them or adds sinks"),
        ("bloom", {"knn": knn()}, "BloomAttention of bloom does not do so"),
        ("falcon", {"knn": knn()}, "FalconAttention of falcon does not do so"),
        ("bert", {"knn": knn()}, "must be a causal language model, got BertFor"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, message, tiny_model):
    model = tiny_model(name)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attach(model, **{"segment_length": SEGMENT, **options})
    assert list(model.state_dict()) == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_queries_or_keys_that_grow_along_the_document_are_refused(name, dtype, tiny_model):
    # positions begin at 0 again in every segment, so the scale would be that of another place
    model = tiny_model("llama", max_position_embeddings=4096).to(dtype)
    places = []

    def see_places(_, args, kwargs):
        given = kwargs.get("position_ids")
        count = kwargs["input_ids"].shape[1]
        places[:] = [torch.arange(count)[None] if given is None else given]

    def grow(_, args, output):
        return output * (1 + (places[0] + 1) / 2048).pow(0.1)[..., None].to(output.dtype)

    model.register_forward_pre_hook(see_places, with_kwargs=True)
    attach(model, knn=knn(), segment_length=512).detach()
    getattr(model.model.layers[1].self_attn, name).register_forward_hook(grow)
    for lengths in ({"segment_length": 512}, {"segment_length": 128, "xl_cache_length": 400}):
        with pytest.raises(ValueError, match="llama scales its queries or keys by their place"):
            attach(model, knn=knn(), **lengths)
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_a_scale_that_no_segment_meets_is_taken():
    config = transformers.Ministral3Config(
        vocab_size=43, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=512,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    )  # fmt: skip
    model = transformers.Ministral3ForCausalLM(config)
    attach(model, knn=knn(), segment_length=64).detach()
    with pytest.raises(ValueError, match="within the 65 tokens of a segment and the XL cache"):
        attach(model, knn=knn(), segment_length=64, xl_cache_length=1)


def test_latent_attention_is_refused():
    config = transformers.DeepseekV3Config(
        vocab_size=43, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6, first_k_dense_replace=2,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    with pytest.raises(ValueError, match="must have one shape in all layers"):
        attach(model, knn=knn(), segment_length=SEGMENT)


def test_a_layer_that_attends_twice_is_refused():
    config = transformers.DiffLlamaConfig(
        vocab_size=43, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.DiffLlamaForCausalLM(config)
    with pytest.raises(ValueError, match="must attend once"):
        attach(model, knn=knn(), segment_length=SEGMENT)


def test_keys_that_are_normalised_after_the_rotation_are_refused():
    config = transformers.HunYuanDenseV1Config(
        vocab_size=43, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = transformers.HunYuanDenseV1ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.key_layernorm.weight.uniform_(0.5, 2)
    with pytest.raises(ValueError, match="rotates its keys in a way that cannot be undone"):
        attach(model, knn=knn(), segment_length=SEGMENT)


def test_a_model_that_computes_otherwise_in_pieces_is_refused(tiny_model):
    model = tiny_model("llama")
    head = model.lm_head.forward
    # what a token is told depends on how many came with it
    model.lm_head.forward = lambda hidden: head(hidden) * hidden.shape[1]
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="must compute the same when a text is cut into pieces"):
        attach(model, knn=knn(), segment_length=SEGMENT)
    assert list(model.state_dict()) == before


def test_layers_without_attention_are_refused():
    config = transformers.JambaConfig(
        vocab_size=43, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=2, use_mamba_kernels=False,
        mamba_d_state=4, mamba_dt_rank=2,
    )  # fmt: skip
    model = transformers.JambaForCausalLM(config)
    with pytest.raises(ValueError, match="Every layer must have one attention"):
        attach(model, knn=knn(), segment_length=SEGMENT)


def test_a_second_memory_is_refused(tiny_model):
    model = tiny_model("llama")
    attach(model, knn=knn(), segment_length=SEGMENT)
    with pytest.raises(ValueError, match="has a memory already"):
        attach(model, knn=knn(), segment_length=SEGMENT)


def test_a_model_without_weights_is_refused(tiny_model):
    model = tiny_model("llama").to("meta")
    with pytest.raises(ValueError, match="meta device"):
        attach(model, knn=knn(), segment_length=SEGMENT)


def test_a_state_of_another_model_is_refused(tiny_model, draw):
    mine = attach(tiny_model("llama"), knn=knn(), segment_length=SEGMENT)
    other = attach(tiny_model("llama"), knn=knn((0,)), segment_length=SEGMENT)
    with pytest.raises(MemoryStateError, match=r"made for another model.*knn_memory.layers"):
        mine(draw(1, 3), state=other.new_state(1))
    same_shape = attach(tiny_model("qwen2"), knn=knn(), segment_length=SEGMENT)
    with pytest.raises(MemoryStateError, match=r"it has model_type qwen2 \(not llama\)"):
        mine(draw(1, 3), state=same_shape.new_state(1))
    # as docs/attach.md says: weights may change between segments, so the kind is all there is
    other_weights = attach(tiny_model("llama"), knn=knn(), segment_length=SEGMENT)
    assert mine(draw(1, 3), state=other_weights.new_state(1)).logits.isfinite().all()
    with pytest.raises(ValueError, match="must have the batch's 2 rows, got 1"):
        mine(draw(2, 3), state=mine.new_state(1))
    with pytest.raises(ValueError, match=r"on the batch's device, cpu, got meta"):
        mine(draw(1, 3), state=mine.new_state(1, device=torch.device("meta")))
    with pytest.raises(ValueError, match="must have the batch's 2 rows, got 1"):
        mine.generate(draw(2, 3), state=mine.new_state(1), num_beams=2, max_new_tokens=2)


def test_documents_beyond_the_last_position_are_refused_before_anything_is_read(tiny_model, draw):
    memory_model = attach(
        tiny_model("gpt2"), knn=knn(), segment_length=SEGMENT, xl_cache_length=SEGMENT
    )
    assert memory_model.max_document_tokens == 64
    state, before = memory_model.new_state(2), draw(2, 11)
    state = read_tokens(memory_model, before, state).state
    expected = read_tokens(memory_model, draw(2, 53), state.fork(), return_logits=True)
    beyond = r"must fit into the 64 positions of the model.*got 65 tokens"
    with pytest.raises(ValueError, match=beyond):
        read_tokens(memory_model, draw(2, 54), state)
    with pytest.raises(ValueError, match=beyond):
        read_tokens(memory_model, draw(2, 54), state, num_tokens=torch.tensor([3, 54]))
    with pytest.raises(ValueError, match=beyond):
        byheart.generate(memory_model.eval(), draw(2, 4), state=state, max_new_tokens=51)
    # nothing was read: the state is what it was, and just as much fits
    found = read_tokens(memory_model, draw(2, 53), state, return_logits=True)
    assert torch.equal(found.logits, expected.logits)
    with pytest.raises(ValueError, match=beyond):
        memory_model(draw(2, 1), state=found.state)
    # a new document begins at the first position
    starts = torch.tensor([True, True])
    read_tokens(memory_model, draw(2, 64), found.state, document_start=starts)
    without = attach(tiny_model("gpt2"), knn=knn(), segment_length=SEGMENT)
    assert without.max_document_tokens is None
    assert read_tokens(without, draw(1, 77), without.new_state(1)).state.position.item() == 77


def test_arguments_that_do_not_go_together_are_refused(tiny_model, draw):
    memory_model = attach(tiny_model("llama"), knn=knn(), segment_length=SEGMENT)
    ids = draw(2, 5)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1] * 5])
    with pytest.raises(ValueError, match="attention_mask has a gap in row 0"):
        memory_model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="must not both be given"):
        memory_model(ids, attention_mask=mask, num_tokens=torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="labels and targets must not both"):
        memory_model(ids, labels=ids, targets=ids)
    with pytest.raises(ValueError, match=r"row 0 has room for 7, got 9"):
        memory_model(draw(1, 9))
    with pytest.raises(ValueError, match="at least one prompt token"):
        memory_model.generate(
            ids, attention_mask=torch.tensor([[0] * 5, [1] * 5]), max_new_tokens=1
        )


def test_an_xl_cache_needs_an_attention_with_a_plain_mask(tiny_model):
    model = tiny_model("llama", attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="needs the attention 'sdpa' or 'eager', got 'flex_att"):
        attach(model, segment_length=SEGMENT, xl_cache_length=SEGMENT)


def test_a_model_that_fails_in_the_trial_is_left_as_it_was(tiny_model, monkeypatch):
    model = tiny_model("llama")
    before = list(model.state_dict())
    head = model.lm_head.forward

    def forward(hidden):
        if hidden.shape[1] < 5:
            msg = "sizes do not match"
            raise RuntimeError(msg)
        return head(hidden)

    monkeypatch.setattr(model.lm_head, "forward", forward)
    with pytest.raises(ValueError, match="llama failed in a trial: sizes do not match"):
        attach(model, knn=knn(), segment_length=SEGMENT)
    assert list(model.state_dict()) == before
    monkeypatch.undo()
    attach(model, knn=knn(), segment_length=SEGMENT)


def test_an_old_memory_does_not_take_off_a_new_one(tiny_model):
    model = tiny_model("llama")
    old = attach(model, knn=knn(), segment_length=SEGMENT)
    old.detach()
    new = attach(model, knn=knn(), segment_length=SEGMENT)
    old.detach()
    assert list(new.memories()) == [1]


def test_angles_that_change_with_the_length_are_refused(tiny_model, draw):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"change with the length of a text beyond 16 tokens"):
        attach(model, knn=knn(), segment_length=17)
    memory_model = attach(model, knn=knn(), segment_length=SEGMENT)
    memory_model.generate(draw(1, 30), max_new_tokens=14)
    with pytest.raises(ValueError, match=r"must fit into the 16 positions of llama, got up to 17"):
        memory_model.generate(draw(1, 30), max_new_tokens=15)


def test_joint_softmax_and_dropout_are_refused(tiny_model, draw):
    model = tiny_model("gpt2", attn_pdrop=0.5)
    memory_model = attach(model, knn=knn(combine="joint"), segment_length=SEGMENT)
    memory_model(draw(1, 3))
    with pytest.raises(ValueError, match=r"attention without dropout, got 0\.5"):
        memory_model.train()(draw(1, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "max_new_tokens must be given"),
        ({"max_length": 40}, "max_new_tokens must be given"),
        ({"max_new_tokens": 3, "repetition_penalty": 2.0}, "repetition_penalty looks at the whole"),
        ({"max_new_tokens": 3, "min_length": 30}, "min_length looks at the whole prompt"),
        (
            {"max_new_tokens": 3, "encoder_repetition_penalty": 2.0},
            r"encoder_repetition_penalty looks at .*got 2\.0\. Leave it out\.",
        ),
        (
            {"max_new_tokens": 3, "encoder_no_repeat_ngram_size": 2},
            "encoder_no_repeat_ngram_size looks at the whole prompt",
        ),
        (
            {"generation_config": GenerationConfig(max_new_tokens=3, repetition_penalty=2.0)},
            "repetition_penalty looks at the whole prompt",
        ),
        ({"max_new_tokens": 3, "guidance_scale": 1.5}, "guidance_scale looks at the whole prompt"),
        ({"max_new_tokens": 3, "bad_words_ids": [[3, 4]]}, "bad_words_ids looks at the whole"),
        ({"max_new_tokens": 3, "bad_words_ids": [5]}, r"bad_words_ids looks at .* got \[5\]"),
        ({"max_new_tokens": 3, "sequence_bias": [5]}, r"sequence_bias looks at .* got \[5\]"),
        ({"max_new_tokens": 3, "sequence_bias": {(3, 4): 1.0}}, "sequence_bias looks at the"),
        ({"max_new_tokens": 3, "forced_bos_token_id": 3}, "forced_bos_token_id looks at the"),
        ({"max_new_tokens": 3, "token_healing": True}, "token_healing looks at the whole prompt"),
        *(
            ({"max_new_tokens": 3, name: torch.zeros(1, 21).long()}, f"{name} must be left out")
            for name in ("inputs_embeds", "position_ids", "past_key_values", "negative_prompt_ids")
        ),
        ({"max_new_tokens": 3, "inputs": torch.zeros(1, 21).long()}, "or inputs, but not both"),
        ({"max_new_tokens": 3, "bogus": 1}, "bogus"),
        ({"max_new_tokens": 90}, "must fit into the 64 positions of gpt2, got up to 92"),
    ],
)
def test_options_of_generate_that_do_not_fit_leave_the_state(options, message, tiny_model, draw):
    memory_model = attach(tiny_model("gpt2"), knn=knn(), segment_length=SEGMENT)
    state = read_tokens(memory_model, draw(1, 9), memory_model.new_state(1)).state
    with pytest.raises(ValueError, match=message):
        memory_model.generate(draw(1, 21), state=state, **options)
    memory_model.generate(draw(1, 21), state=state, max_new_tokens=3)
    memory_model(draw(1, 3), state=state)


@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [
        ("repetition_penalty", 5.0, 1.0),
        ("encoder_repetition_penalty", 5.0, 1.0),
        ("no_repeat_ngram_size", 2, 0),
        ("min_length", 30, 0),
        ("guidance_scale", 1.5, 1.0),
    ],
)
def test_whole_prompt_options_of_the_model_are_refused(name, value, harmless, tiny_model, draw):
    memory_model = attach(tiny_model("llama"), knn=knn(), segment_length=SEGMENT).eval()
    setattr(memory_model.model.generation_config, name, value)
    message = rf"The generation_config of the model has {name}={value}, .*Pass {name}={harmless}\."
    given = {"max_new_tokens": 3}
    for options in (
        given,
        {"generation_config": GenerationConfig(**given)},
        {**given, "generation_config": GenerationConfig()},
    ):
        with pytest.raises(ValueError, match=message):
            memory_model.generate(draw(1, 21), **options)
    for options in (
        {**given, name: harmless},
        {"generation_config": GenerationConfig(**given, **{name: harmless})},
    ):
        out = memory_model.generate(
            draw(1, 21), **options, return_dict_in_generate=True, output_scores=True,
            output_logits=True,
        )  # fmt: skip
        assert all(map(torch.equal, out.scores, out.logits))


def test_a_prompt_lookup_of_the_model_is_refused(tiny_model, draw):
    memory_model = attach(tiny_model("llama"), knn=knn(), segment_length=SEGMENT).eval()
    memory_model.model.generation_config.prompt_lookup_num_tokens = 2
    with pytest.raises(ValueError, match=r"Set it to None there\."):
        memory_model.generate(draw(1, 21), max_new_tokens=3)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_place_of_searches_is_within_what_angles_reach(kind, tiny_model, draw):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10_000.0}
    settings = {"max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
        rope |= {"original_max_position_embeddings": 16}
        settings = {"max_position_embeddings": 32}
    model = tiny_model("llama", rope_parameters=rope, **settings)
    with pytest.raises(ValueError, match=r"16 tokens, got segment_length=16 and a search from the"):
        attach(model, knn=knn(), segment_length=16, memory_position="window")
    for length, position in ((16, "none"), (16, "local"), (15, "window")):
        ids = draw(1, length)
        expected = model(ids, use_cache=False).logits
        memory_model = attach(model, knn=knn(), segment_length=length, memory_position=position)
        state = memory_model.new_state(1)
        for _ in range(2):
            out = memory_model(ids, state=state)
            assert torch.equal(out.logits, expected)
            state = state.commit(out.new_entries)
        assert torch.equal(memory_model.detach()(ids, use_cache=False).logits, expected)

"""What cannot be honoured is refused, with the reason and a remedy."""

import dataclasses
import inspect

import pytest
import torch
import transformers

from byheart.adapters.families import model_kind, whole_window_layers
from byheart.adapters.heads import AnswerHead
from byheart.adapters.recurrent import RecurrentMemory
from byheart.errors import CheckpointError, MemoryStateError
from byheart.memory.recurrent import RecurrentState
from byheart.models.recurrent_text import text_extents

SMALL = {
    "vocab_size": 43,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SEQ2SEQ = {
    "vocab_size": 43,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
LONGT5 = {
    "vocab_size": 43, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


@pytest.fixture
def decoder(tiny_model, wrap):
    return wrap(tiny_model("gpt2"))


@pytest.fixture
def encoder(tiny_model, wrap):
    return wrap(tiny_model("bert"))


@pytest.fixture
def seq2seq(tiny_model, wrap):
    return wrap(tiny_model("t5"))


@pytest.mark.parametrize(
    ("name", "specials", "most"),
    [
        ("gpt2", {}, 64 - 2 * 3),
        ("opt", {}, 64 - 2 * 3),
        ("bert", {"start_ids": (1,), "separator_ids": (2,), "end_ids": (2,)}, 64 - 3 - 3),
        ("roberta", {}, 64 - 3),
        ("electra", {}, 64 - 3),
    ],
)
def test_a_window_that_is_too_small_names_the_segment_length_that_fits(
    name, specials, most, tiny_model, wrap, draw
):
    model = tiny_model(name)
    with pytest.raises(ValueError, match=rf"window of 64 positions.* at most {most}\."):
        wrap(model, segment_length=most + 1, **specials)
    assert wrap(model, segment_length=most, **specials)(draw(1, most)).logits.isfinite().all()


def test_memory_that_leaves_no_place_for_text_is_named(tiny_model, wrap):
    with pytest.raises(ValueError, match=r"window of 64 positions.*Use fewer memory tokens"):
        wrap(tiny_model("gpt2"), num_memory_tokens=32)


def test_the_reports_window_holds_499_tokens_of_text(wrap):
    config = transformers.BertConfig(**{**SMALL, "max_position_embeddings": 512})
    specials = {"start_ids": (1,), "separator_ids": (2,), "end_ids": (2,), "num_memory_tokens": 10}
    model = transformers.BertForSequenceClassification(config)
    wrap(model, segment_length=499, **specials)
    with pytest.raises(ValueError, match=r"at most 499\."):
        wrap(model, segment_length=500, **specials)


@pytest.mark.parametrize("name", ["t5", "bloom"])
def test_relative_positions_limit_no_window(name, tiny_model, wrap, draw):
    memory_model = wrap(tiny_model(name), segment_length=3000)
    assert memory_model.layout.segment_length == 3000


@pytest.mark.parametrize(
    ("name", "sight", "reach"),
    [
        ("mistral", {"sliding_window": 12}, 12),
        ("phi3", {"sliding_window": 12}, 12),
        ("gemma3", {"sliding_window": 12, "layer_types": ["sliding_attention"] * 2}, 12),
        ("modernbert", {"local_attention": 24, "layer_types": ["sliding_attention"] * 2}, 12),
    ],
)
def test_local_attention_that_loses_the_memory_is_refused(name, sight, reach, tiny_model, wrap):
    model = tiny_model(name, **sight)
    with pytest.raises(ValueError, match=rf"no layer of \w+ looks farther than {reach} positions"):
        wrap(model, segment_length=10)
    copies = 1 if name == "modernbert" else 2
    wrap(model, segment_length=reach - copies * 3)
    wrap(model, segment_length=30, num_memory_tokens=0)


def test_layers_that_all_see_everything_are_accepted(tiny_model, wrap):
    full = {"sliding_window": 4, "layer_types": ["full_attention"] * 2}
    wrap(tiny_model("gemma3", **full))
    wrap(tiny_model("qwen2", sliding_window=4, use_sliding_window=False))


@pytest.mark.parametrize(
    ("name", "sight", "length", "expected"),
    [
        ("bert", {}, 60, (True, True)),
        ("modernbert", {"local_attention": 8}, 30, (True, False)),
        ("modernbert", {"local_attention": 8}, 4, (True, True)),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": False}, 30, (True, True)),
    ],
)
def test_layers_that_see_the_whole_window_are_told_from_local_ones(
    name, sight, length, expected, tiny_model
):
    if name == "modernbert":
        sight = {**sight, "layer_types": ["full_attention", "sliding_attention"]}
    assert whole_window_layers(tiny_model(name, **sight), length) == expected


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "modernbert"])
@pytest.mark.parametrize("kinds", [("full", "sliding"), ("sliding", "full")])
def test_a_layer_that_sees_everything_reads_and_writes_memory(name, kinds, tiny_model, wrap, draw):
    layers = [f"{kind}_attention" for kind in kinds]
    sight = {"local_attention": 8} if name == "modernbert" else {"sliding_window": 4}
    memory_model = wrap(tiny_model(name, layer_types=layers, **sight), segment_length=30)
    ids = draw(1, 60)
    other = ids.clone()
    other[0, 9] = 3 + (ids[0, 9] - 2) % 10  # far from both ends of the first segment
    with torch.no_grad():
        first, second = (memory_model(tokens).logits[0, -1] for tokens in (ids, other))
    assert (first - second).abs().max() > 1e-6


def test_longt5s_local_attention_is_refused(wrap):
    config = transformers.LongT5Config(**LONGT5, local_radius=8)
    model = transformers.LongT5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="looks farther than 9 positions"):
        wrap(model)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ("AlbertConfig", "AlbertForSequenceClassification"),
        ("ElectraConfig", "ElectraForSequenceClassification"),
    ],
)
def test_factorised_embeddings_are_refused(config, model, wrap):
    made = getattr(transformers, model)(getattr(transformers, config)(**SMALL, embedding_size=8))
    with pytest.raises(ValueError, match=rf"got 16 and 8 for {model}"):
        wrap(made)


def test_opts_projected_embeddings_are_what_the_head_reads(tiny_model, wrap, draw):
    model = tiny_model("opt", word_embed_proj_dim=8, do_layer_norm_before=False)
    assert wrap(model)(draw(1, 20)).new_entries.memory.shape == (1, 3, 8)


@pytest.mark.parametrize("name", ["Pegasus", "BlenderbotSmall"])
def test_embeddings_that_are_scaled_outside_are_refused(name, wrap):
    def make(**scaling):
        config = getattr(transformers, f"{name}Config")(**SEQ2SEQ, **scaling)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    with pytest.raises(ValueError, match="does more with tokens than to look them up"):
        wrap(make(scale_embedding=True))
    wrap(make(scale_embedding=False))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GPT2Model", ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2})),
        ("GPT2ForSequenceClassification", ("GPT2Config", {"n_embd": 16, "n_head": 2})),
        ("BertForMaskedLM", ("BertConfig", SMALL)),
        ("BertModel", ("BertConfig", SMALL)),
        ("BartForSequenceClassification", ("BartConfig", SEQ2SEQ)),
        ("T5EncoderModel", ("T5Config", LONGT5)),
    ],
)
def test_models_of_other_kinds_are_refused(name, settings, wrap):
    config = getattr(transformers, settings[0])(**{"n_layer": 1, **settings[1]})
    with pytest.raises(ValueError, match=rf"model must be a causal .*, got {name}\. Load"):
        wrap(getattr(transformers, name)(config))


@pytest.mark.parametrize(
    ("around", "name"), [(str, "str"), (torch.nn.DataParallel, "DataParallel")]
)
def test_what_is_no_model_itself_is_refused(around, name, tiny_model):
    # as a user calls it, whose types nothing checks before
    kind = inspect.unwrap(model_kind)
    with pytest.raises(TypeError, match=rf"got {name}\. Pass the model itself"):
        kind(around(tiny_model("gpt2")))


@pytest.mark.parametrize("name", ["BertLMHeadModel", "BertGenerationDecoder"])
def test_a_language_model_that_looks_ahead_is_refused(name, wrap, draw):
    def build(**changes):
        config = "BertConfig" if name == "BertLMHeadModel" else "BertGenerationConfig"
        return getattr(transformers, name)(getattr(transformers, config)(**SMALL, **changes))

    with pytest.raises(ValueError, match=rf"got {name}\. Set is_decoder=True in its config"):
        wrap(build(is_decoder=False))
    memory_model = wrap(build(is_decoder=True))
    ids = draw(1, 9)
    changed = ids.clone()
    changed[0, 5] = 3 + ids[0, 5] % 40
    before, after = (memory_model(tokens).logits for tokens in (ids, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("name", ["ConvBert", "FNet", "MobileBert", "Nystromformer", "Yoso"])
def test_encoders_that_mix_padding_with_text_are_refused(name, wrap):
    settings = {**SMALL, "embedding_size": 16}
    config = getattr(transformers, f"{name}Config")(**settings)
    with pytest.raises(ValueError, match="mixes it with the text"):
        wrap(getattr(transformers, f"{name}ForSequenceClassification")(config))


def test_a_model_that_pools_positions_is_refused(wrap, draw):
    config = transformers.FunnelConfig(
        vocab_size=43, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=24
    )
    memory_model = wrap(transformers.FunnelForSequenceClassification(config))
    with pytest.raises(ValueError, match="one hidden state per position, got 5 for 10"):
        memory_model(draw(1, 14))


@pytest.mark.parametrize("place", ["start_ids", "separator_ids", "end_ids"])
def test_special_tokens_around_a_decoders_memory_are_refused(place, tiny_model, wrap):
    with pytest.raises(ValueError, match=r"must be empty for a decoder.*Put special tokens"):
        wrap(tiny_model("gpt2"), **{place: (1,)})


@pytest.mark.parametrize("token", [43, -1])
def test_special_tokens_outside_of_the_vocabulary_are_refused(token, tiny_model, wrap):
    with pytest.raises(ValueError, match=rf"below the model's vocabulary of 43, got \({token},\)"):
        wrap(tiny_model("bert"), end_ids=(token,))


def test_what_is_no_tensor_is_refused(decoder, draw):
    # as a user calls them, whose types nothing checks before
    with pytest.raises(TypeError, match="attention_mask must be a tensor, got list"):
        inspect.unwrap(text_extents)(draw(1, 9), [[1] * 9])
    with pytest.raises(TypeError, match="document_start must be a tensor of booleans, got list"):
        inspect.unwrap(RecurrentState.start_documents)(decoder.new_state(1), [True])
    with pytest.raises(ValueError, match=r"labels must be \[batch, answer\], got the shape \[2\]"):
        inspect.unwrap(AnswerHead.__init__)(AnswerHead(draw(1, 2)), torch.tensor([3, 4]))


def test_whole_numbers_of_other_types_are_tokens(decoder, draw):
    ids = draw(2, 16)
    small = ids.to(torch.int32)
    expected, found = decoder(ids, labels=ids), decoder(small, labels=small)
    assert torch.equal(found.loss, expected.loss)
    decoder(small, state=decoder.new_state(2).commit(found.new_entries))


def test_labels_under_padding_are_not_read(decoder, draw):
    ids = draw(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -1)
    expected = decoder(ids, attention_mask=mask, labels=ids).loss
    assert torch.equal(decoder(ids, attention_mask=mask, labels=labels).loss, expected)
    labels[1, 4] = -1
    with pytest.raises(ValueError, match="labels must be between 0 and 42, or -100 for none, got"):
        decoder(ids, attention_mask=mask, labels=labels)


def test_padding_of_the_text_hides_no_wrong_answer(tiny_model, wrap, draw):
    memory_model, ids = wrap(tiny_model("t5")), draw(2, 9)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    labels = ids.clone()
    labels[1, 7] = 43
    with pytest.raises(
        ValueError, match="labels must be between 0 and 42, or -100 for none, got 43"
    ):
        memory_model(ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize("token", [43, -1])
def test_unknown_tokens_are_refused(token, decoder, draw):
    ids = draw(2, 9)
    ids[1, 3] = token
    with pytest.raises(ValueError, match="input_ids must be between 0 and 42, got"):
        decoder(ids)


@pytest.mark.parametrize("change", [lambda ids: ids[0], lambda ids: ids.float()])
def test_what_is_no_batch_of_tokens_is_refused(change, decoder, draw):
    # as a user calls it, whose arguments nothing checks before
    forward = inspect.unwrap(type(decoder).forward)
    with pytest.raises(ValueError, match=r"whole numbers of the shape \[batch, tokens\], got \["):
        forward(decoder, change(draw(2, 9)))


def test_a_mask_with_holes_is_refused(decoder, draw):
    mask = torch.ones(3, 9).long()
    mask[2, 4] = 0
    with pytest.raises(ValueError, match="row 2 has holes"):
        decoder(draw(3, 9), attention_mask=mask)


def test_a_mask_of_another_shape_is_refused(decoder, draw):
    with pytest.raises(ValueError, match=r"shape of input_ids, \[2, 9\], got \[2, 8\]"):
        decoder(draw(2, 9), attention_mask=torch.ones(2, 8).long())


@pytest.mark.parametrize("name", ["encoder", "seq2seq"])
def test_a_row_without_text_is_refused_where_each_row_has_an_answer(name, request, draw):
    memory_model = request.getfixturevalue(name)
    labels = draw(2, 4) if name == "seq2seq" else torch.tensor([1, 2])
    mask = torch.tensor([[1] * 9, [0] * 9])
    with pytest.raises(ValueError, match="row 1 is all padding"):
        memory_model(draw(2, 9), attention_mask=mask, labels=labels)


def test_labels_on_no_token_are_refused(decoder, encoder, seq2seq, draw):
    ids, none = draw(2, 9), torch.full((2, 9), -100)
    with pytest.raises(ValueError, match="got none after moving them by one"):
        decoder(ids, labels=none)
    with pytest.raises(ValueError, match=r"not -100, got none\."):
        decoder(ids, targets=none)
    with pytest.raises(ValueError, match=r"not -100, got none\."):
        seq2seq(ids, labels=none)
    with pytest.raises(ValueError, match="At least one row must have a label that is not -100"):
        encoder(ids, labels=none[:, 0])
    first = none.clone()
    first[:, 0] = 5  # nothing predicts the first token
    with pytest.raises(ValueError, match="got none after moving them by one"):
        decoder(ids, labels=first)


def test_labels_on_padding_alone_are_refused(decoder, draw):
    ids, targets = draw(2, 9), torch.full((2, 9), -100)
    mask = torch.ones(2, 9).long()
    mask[1] = 0
    targets[1] = 5
    with pytest.raises(ValueError, match=r"not -100, got none\."):
        decoder(ids, targets=targets, attention_mask=mask)


def test_labels_of_another_shape_are_refused(decoder, draw):
    with pytest.raises(ValueError, match=r"one entry per input token, \[2, 9\], got \[2, 8\]"):
        decoder(draw(2, 9), labels=draw(2, 8))


def test_labels_for_other_rows_are_refused(encoder, draw):
    with pytest.raises(ValueError, match=r"one entry per row \(2\), got 3"):
        encoder(draw(2, 9), labels=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("labels", "expected"), [(torch.ones(2, 5).long(), r"\[2\]"), (torch.ones(2), r"\[2, 5\]")]
)
def test_labels_of_another_shape_are_refused_by_a_classifier(labels, expected, encoder, draw):
    with pytest.raises(ValueError, match=rf"labels must have the shape {expected}, got \[2"):
        encoder(draw(2, 9), labels=labels)


@pytest.mark.parametrize(("labels", "met"), [([0, 5], "0 to 5"), ([-1, 4], "-1 to 4")])
def test_classes_that_the_model_has_not_are_refused(labels, met, encoder, draw):
    message = rf"labels must be -100 or between 0 and 4, got {met}\. Load .* \(num_labels\)"
    with pytest.raises(ValueError, match=message):
        encoder(draw(2, 9), labels=torch.tensor(labels))
    encoder(draw(2, 9), labels=torch.tensor([-100, 4]))


def test_labels_and_targets_exclude_each_other(decoder, draw):
    ids = draw(2, 9)
    with pytest.raises(ValueError, match="must not both be given"):
        decoder(ids, labels=ids, targets=ids)


@pytest.mark.parametrize("arguments", [{"targets": torch.ones(2, 9).long()}, {"logits_to_keep": 1}])
def test_arguments_for_language_models_are_refused_elsewhere(arguments, encoder, draw):
    with pytest.raises(ValueError, match="are for language models, got a model of kind 'encoder'"):
        encoder(draw(2, 9), **arguments)


@pytest.mark.parametrize("kept", [-1, 10])
def test_more_logits_than_columns_are_refused(kept, decoder, draw):
    with pytest.raises(ValueError, match=rf"between 0 and the 9 columns, got {kept}"):
        decoder(draw(2, 9), logits_to_keep=kept)


def test_an_encoder_decoder_needs_labels(seq2seq, draw):
    with pytest.raises(ValueError, match="Use generate to answer"):
        seq2seq(draw(2, 9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_memory_tokens": 4}, r"num_memory_tokens 4 \(not 3\)"),
        ({"segment_length": 8}, r"segment_length 8 \(not 7\)"),
    ],
)
def test_the_state_of_another_model_is_refused(settings, message, decoder, tiny_model, wrap, draw):
    other = wrap(tiny_model("gpt2"), **settings)
    with pytest.raises(MemoryStateError, match=message):
        decoder(draw(2, 9), state=other.new_state(2))


def test_a_state_of_another_width_is_refused(decoder, tiny_model, wrap, draw):
    other = wrap(tiny_model("gpt2", n_embd=32))
    with pytest.raises(MemoryStateError, match=r"embed_dim 32 \(not 16\)"):
        decoder(draw(2, 9), state=other.new_state(2))


def test_a_state_of_other_rows_is_refused(decoder, draw):
    with pytest.raises(ValueError, match="must have the batch's 2 rows, got 3"):
        decoder(draw(2, 9), state=decoder.new_state(3))


def test_a_saved_state_belongs_to_its_weights(decoder, draw, tmp_path):
    state = decoder.new_state(1).commit(decoder(draw(1, 9)).new_entries)
    decoder.save_state(state, tmp_path / "state")
    with torch.no_grad():
        decoder.memory.memory[0, 0] += 1
    with pytest.raises(MemoryStateError, match="made by a model with fingerprint"):
        decoder.load_state(tmp_path / "state")


def test_a_damaged_state_is_refused(decoder, tmp_path):
    decoder.save_state(decoder.new_state(1), tmp_path / "state")
    (file,) = (tmp_path / "state").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="state"):
        decoder.load_state(tmp_path / "state")


def test_a_state_of_another_model_is_not_saved(decoder, tmp_path):
    state = decoder.new_state(1)
    other = dataclasses.replace(state, layout=dataclasses.replace(state.layout, segment_length=9))
    with pytest.raises(MemoryStateError, match=r"segment_length 9 \(not 7\)"):
        decoder.save_state(other, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_pass_is_committed_once_and_to_its_own_state(decoder, draw):
    state = decoder.new_state(2)
    out = decoder(draw(2, 9), state=state)
    after = state.commit(out.new_entries)
    with pytest.raises(MemoryStateError, match="Commit each pass once"):
        after.commit(out.new_entries)
    with pytest.raises(MemoryStateError, match="Commit each pass once"):
        decoder.new_state(3).commit(out.new_entries)


def test_a_refused_pass_leaves_no_hook_behind(decoder, draw):
    ids = draw(2, 9)
    wrong = ids.clone()
    wrong[:, 3] = 99  # a label outside of the vocabulary is met in the middle of the pass
    with pytest.raises((IndexError, ValueError)):
        decoder(ids, targets=wrong)
    assert decoder.model(input_ids=ids).logits.shape == (2, 9, 43)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_model_that_returns_tuples_is_refused(name, tiny_model, wrap):
    model = tiny_model(name)
    model.config.return_dict = False
    with pytest.raises(
        ValueError, match=r"return_dict must be True, got False\. Set model\.config"
    ):
        wrap(model)


def test_a_model_without_a_table_of_embeddings_is_refused(wrap):
    config = transformers.IBertConfig(**SMALL)
    model = transformers.IBertForSequenceClassification(config).eval()
    with pytest.raises(ValueError, match="must be a table of vectors, got QuantEmbedding of ibert"):
        wrap(model)


@pytest.mark.usefixtures("without_typechecks")
def test_a_config_of_another_kind_is_refused(tiny_model):
    with pytest.raises(TypeError, match="config must be a RecurrentMemoryConfig, got dict"):
        RecurrentMemory(tiny_model("bert"), {"segment_length": 7})


@pytest.mark.usefixtures("without_typechecks")
def test_what_a_pass_returns_is_no_memory(decoder, draw, tmp_path):
    out = decoder(draw(1, 9))
    for wrong in (out, None):
        with pytest.raises(TypeError, match=r"commit takes out\.new_entries of a pass, got "):
            decoder.new_state(1).commit(wrong)
    with pytest.raises(TypeError, match="state must be a RecurrentState, got NewMemory"):
        decoder.save_state(out.new_entries, tmp_path / "state")
    assert not list(tmp_path.iterdir())

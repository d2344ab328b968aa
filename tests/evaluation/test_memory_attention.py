"""Attention of memory: the model's own weights, in the order of the recurrence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from byheart.adapters.attention_maps import segment_attention
from byheart.adapters.recurrent import RecurrentMemory
from byheart.cli.reproduce_tasks import _write_attention
from byheart.data.tasks import Task, TaskConfig, train_task_tokenizer
from byheart.evaluation.memory_attention import (
    Head,
    MemoryAttention,
    SegmentMap,
    memory_attention,
    plot_memory_attention,
    plot_memory_gates,
)
from byheart.models.recurrent_config import RecurrentMemoryConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LENGTH, MEMORY, LAYERS, HEADS = 23, 5, 3, 2
WINDOW = LENGTH + MEMORY + 3


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    path = tmp_path_factory.mktemp("stories") / "stories.txt"
    path.write_text("The boat waited near a bridge. Nobody came, and the river was quiet. " * 30)
    config = TaskConfig(name="reason", segment_length=LENGTH, background=str(path))
    return Task(config, train_task_tokenizer(config, 900), split="train")


def shaken(model, size, **settings) -> RecurrentMemory:
    config = RecurrentMemoryConfig(
        segment_length=LENGTH, num_memory_tokens=MEMORY, start_ids=(size,),
        separator_ids=(size + 1,), end_ids=(size + 1,), **settings,
    )  # fmt: skip
    memory_model = RecurrentMemory(model, config).eval()
    with torch.no_grad():
        for parameter in memory_model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    return memory_model


@pytest.fixture
def model(task) -> RecurrentMemory:
    size = task.tokenizer.vocab_size
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=size + 2, hidden_size=14, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, intermediate_size=11, max_position_embeddings=WINDOW,
        )
    )  # fmt: skip
    return shaken(bert, size)


@pytest.fixture
def mean_model(task) -> RecurrentMemory:
    """As the recipe of `reason` has it: the first layer is local, the memory has gates."""
    size = task.tokenizer.vocab_size
    bert = ModernBertForSequenceClassification(
        ModernBertConfig(
            vocab_size=size + 3, hidden_size=20, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, intermediate_size=11, max_position_embeddings=WINDOW,
            layer_types=["sliding_attention"] + ["full_attention"] * (LAYERS - 1),
            local_attention=12, classifier_pooling="mean", pad_token_id=size + 2,
            bos_token_id=size, cls_token_id=size, eos_token_id=size + 1, sep_token_id=size + 1,
        )
    )  # fmt: skip
    return shaken(bert, size, update="gated", gate_bias_init=0.0)


def test_first_segment_shows_the_attention_of_the_model_itself(task, model):
    sample = task.sample(0, 3)
    tokens = torch.from_numpy(sample.tokens(0, LENGTH)).long()
    size = task.tokenizer.vocab_size
    embed = model.model.get_input_embeddings()
    special = embed(torch.tensor([size, size + 1]))
    window = torch.cat([special[:1], model.memory.memory, special[1:], embed(tokens), special[1:]])
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model.model.bert(inputs_embeds=window[None], output_attentions=True).attentions
    first = memory_attention(model, sample).segments[0]
    for layer, weights in enumerate(expected):
        torch.testing.assert_close(first.weights[layer], weights[0, :, : MEMORY + 2])


def test_every_query_spreads_an_attention_of_one(task, model):
    attention = memory_attention(model, task.sample(1, 4))
    assert len(attention.segments) == 4
    for index, segment in enumerate(attention.segments):
        rows = MEMORY + 2 + (task.sample(1, 4).question_length if index == 3 else 0)
        assert segment.weights.shape == (LAYERS, HEADS, rows, WINDOW)
        torch.testing.assert_close(segment.weights.sum(dim=-1), torch.ones(LAYERS, HEADS, rows))


def test_later_segments_read_what_earlier_ones_have_written(task, model):
    ids = torch.from_numpy(task.sample(2, 3).tokens(0, 3 * LENGTH)).long()
    changed = ids.clone()
    changed[4] = (changed[4] + 1) % 200
    before, after = segment_attention(model, ids), segment_attention(model, changed)
    assert not torch.equal(before[2].weights, after[2].weights)
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % 200
    after = segment_attention(model, changed)
    assert torch.equal(before[1].weights, after[1].weights)


def test_labels_and_marks_stand_where_the_tokens_are(task, model):
    sample = task.sample(3, 4)
    segments = memory_attention(model, sample).segments
    for index, segment in enumerate(segments):
        before = ("[start 0]", *(f"[mem {i}]" for i in range(5)), "[sep 0]")
        assert segment.query_labels[:7] == segment.key_labels[:7] == before
        assert segment.key_labels[-1] == "[end 0]"
        assert segment.is_memory.nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
        words = "".join(segment.key_labels[7:-1])
        tokens = sample.tokens(index * LENGTH, (index + 1) * LENGTH)
        assert words == "".join(task.tokenizer.decode([token]) for token in tokens.tolist())
    marked = [
        label
        for segment in segments
        for label, is_fact in zip(segment.key_labels, segment.is_fact, strict=True)
        if is_fact
    ]
    facts = sorted(sample.facts, key=lambda fact: fact[0])
    assert "".join(marked) == "".join(task.tokenizer.decode(fact) for _, fact in facts)
    asked = task.tokenizer.decode(sample.question.tolist())
    assert "".join(segments[3].query_labels[7:]) == asked
    places = segments[3].is_question.nonzero().flatten().tolist()
    assert "".join(segments[3].key_labels[place] for place in places) == asked
    assert not any(bool(segment.is_question.any()) for segment in segments[:3])


def test_reading_is_measured_where_the_answer_is_read_from(task, model, mean_model):
    sample = task.sample(3, 4)
    ids = torch.from_numpy(sample.tokens(0, 4 * LENGTH)).long()
    for memory_model, rows in (
        (model, slice(0, 1)),
        (mean_model, slice(WINDOW - 1 - sample.question_length, WINDOW - 1)),
    ):
        weights = segment_attention(memory_model, ids)[3].weights
        expected = weights[:, :, rows, 1 : 1 + MEMORY].sum(dim=-1).mean(dim=-1)
        attention = memory_attention(memory_model, sample)
        torch.testing.assert_close(attention.read(), expected)
        assert not any(bool(segment.is_answer.any()) for segment in attention.segments[:3])


def test_only_layers_that_see_the_whole_window_are_chosen_from(task, model, mean_model):
    assert memory_attention(model, task.sample(0, 2)).sees_all.tolist() == [True] * LAYERS
    attention = memory_attention(mean_model, task.sample(0, 2))
    assert attention.sees_all.tolist() == [False, True, True]
    assert all(head.layer > 0 for head in attention.telling_heads().values())


def test_gates_are_those_that_the_memory_went_through(task, model, mean_model):
    sample = task.sample(2, 3)
    assert memory_attention(model, sample).gates is None
    attention = memory_attention(mean_model, sample)
    assert attention.gates.shape == (3, MEMORY)
    assert 0 <= attention.gates.min() < attention.gates.max() <= 1
    ids = torch.from_numpy(sample.tokens(0, 3 * LENGTH)).long()[None]
    with torch.no_grad():
        share = mean_model(ids).write_share
    torch.testing.assert_close(attention.gates.mean(), share)


def test_looking_changes_nothing(task, model):
    # as of a model from a checkpoint that was just wrapped, with a layer of its own mode
    model.train(), model.model.eval(), model.model.classifier.train()
    modes = [part.training for part in model.modules()]
    before = model.model.config._attn_implementation
    state = torch.get_rng_state()
    memory_attention(model, task.sample(0, 2))
    assert [part.training for part in model.modules()] == modes
    assert model.model.config._attn_implementation == before != "eager"
    assert torch.equal(torch.get_rng_state(), state)


def worked_example() -> MemoryAttention:
    """Two segments, one layer of two heads, one memory token; windows [start mem sep fact end]."""
    writes = [[0, 1, 0, 0, 0], [0.1, 0.1, 0, 0.8, 0], [1, 0, 0, 0, 0]]
    keeps = [[0.5, 0.5, 0, 0, 0], [0, 0.9, 0, 0.1, 0], [1, 0, 0, 0, 0]]
    segment = SegmentMap(
        weights=torch.tensor([[writes, keeps]]),
        query_labels=("[start 0]", "[mem 0]", "[sep 0]"),
        key_labels=("[start 0]", "[mem 0]", "[sep 0]", " Mary", "[end 0]"),
        is_memory=torch.tensor([False, True, False, False, False]),
        is_fact=torch.tensor([False, False, False, True, False]),
        is_question=torch.zeros(5, dtype=torch.bool),
        is_answer=torch.tensor([True, False, False]),
    )
    # the last segment has a question more
    asks = [[[0, 1, 0, 0, 0]], [[0, 0, 1, 0, 0]]]
    last = replace(
        segment,
        weights=torch.cat([segment.weights, torch.tensor([asks])], dim=2),
        query_labels=(*segment.query_labels, " Where"),
        is_question=torch.tensor([False, False, False, True, False]),
        is_answer=torch.tensor([True, False, False, False]),
    )
    return MemoryAttention(
        segments=(segment, last),
        sees_all=torch.tensor([True]),
        gates=torch.tensor([[0.25], [1.0]]),
    )


def test_what_heads_do_by_hand():
    attention = worked_example()
    torch.testing.assert_close(attention.written(), torch.tensor([[0.8, 0.1]]))
    torch.testing.assert_close(attention.kept(), torch.tensor([[0.1, 0.9]]))
    torch.testing.assert_close(attention.read(), torch.tensor([[1.0, 0.5]]))
    assert attention.telling_heads() == {
        "write": Head(0, 0), "keep": Head(0, 1), "read": Head(0, 0)
    }  # fmt: skip


def test_a_local_layer_is_not_chosen_however_much_it_does_by_hand():
    attention = worked_example()
    both = tuple(
        replace(segment, weights=torch.cat([segment.weights, segment.weights.flip(1) / 2]))
        for segment in attention.segments
    )
    whole = replace(attention, segments=both, sees_all=torch.tensor([True, True]))
    assert whole.telling_heads()["keep"] == Head(0, 1)
    local = replace(whole, sees_all=torch.tensor([False, True]))
    assert local.telling_heads() == {"write": Head(1, 1), "keep": Head(1, 0), "read": Head(1, 1)}


def test_result_is_json_and_a_figure(tmp_path):
    attention = worked_example()
    content = json.loads(json.dumps(attention.to_dict()))
    assert content["heads"]["keep"]["head"] == 1
    assert content["labels"][0][3] == " Mary"
    assert content["query_labels"][1][3] == " Where"
    assert (content["sees_all"], content["gates"]) == ([True], [[0.25], [1.0]])
    path = plot_memory_attention(attention, Head(0, 1), tmp_path / "map.png", title="keep")
    assert path.read_bytes().startswith(b"\x89PNG")
    path = plot_memory_gates(attention, tmp_path / "gates.png", title="gates")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_gates_of_a_memory_without_them_are_not_drawn(tmp_path):
    attention = replace(worked_example(), gates=None)
    assert attention.to_dict()["gates"] is None
    with pytest.raises(ValueError, match="The memory must have gates to plot, got one without"):
        plot_memory_gates(attention, tmp_path / "gates.png")
    assert not list(tmp_path.iterdir())


def test_a_mean_reads_where_the_question_stands_by_hand():
    attention = worked_example()
    last = replace(attention.segments[1], is_answer=torch.tensor([False, False, False, True]))
    attention = replace(attention, segments=(attention.segments[0], last))
    torch.testing.assert_close(attention.read(), torch.tensor([[1.0, 0.0]]))


def test_models_and_documents_without_such_attention_are_refused(task, model):
    empty = RecurrentMemory(model.model, replace(model.memory_config, num_memory_tokens=0))
    with pytest.raises(ValueError, match="must have memory tokens to look at, got num_memory_"):
        memory_attention(empty, task.sample(0, 2))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=12, n_layer=1, n_head=2))
    decoder = RecurrentMemory(gpt2, RecurrentMemoryConfig(segment_length=7, num_memory_tokens=2))
    with pytest.raises(ValueError, match=r"need an encoder .*, got a model of kind 'decoder'"):
        segment_attention(decoder, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="input_ids must hold at least one token"):
        segment_attention(model, torch.zeros(0, dtype=torch.long))


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The committed run of `reason`, looked at once more."""
    folder = tmp_path_factory.mktemp("attention")
    files = _write_attention(RESULTS / "reason" / "seed-0", folder, plot=True)
    assert all(path.read_bytes() for path in files)
    assert {path.name for path in files} == {
        path.name for path in (RESULTS / "reason").glob("attention*")
    }
    return json.loads((folder / "attention.json").read_text())


def test_the_committed_maps_of_reason_are_what_its_weights_do(committed):
    published = json.loads((RESULTS / "reason" / "attention.json").read_text())
    assert published["labels"] == committed["labels"]
    # other processors round otherwise, which travels through four segments
    for name in ("gates", "written", "kept", "read"):
        torch.testing.assert_close(
            torch.tensor(committed[name]), torch.tensor(published[name]), rtol=0, atol=2e-2
        )


def test_reason_keeps_its_facts_by_closing_the_gates(committed):
    sees_all, gates = committed["sees_all"], torch.tensor(committed["gates"])
    assert sees_all == [False, False, True, True]
    assert all(sees_all[head["layer"]] for head in committed["heads"].values())
    # the question finds in the memory what no segment of its own says
    read = committed["heads"]["read"]
    assert committed["read"][read["layer"]][read["head"]] > 0.5
    # nothing is read after the last segment, so that what its question opens costs nothing
    assert gates[2].max() == 0 < gates[:2].amin(dim=0).max()

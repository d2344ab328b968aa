"""What a row reads does not depend on pieces, padding, batch mates, or saving in between."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
BERT_LAYOUT = {"start_ids": (1,), "separator_ids": (2,), "end_ids": (2,)}


def answers(family, draw, batch):
    return draw(batch, 4, seed=5) if family.kind == "encoder-decoder" else None


def layout(family):
    return BERT_LAYOUT if family.kind == "encoder" else {}


def pieces_of(ids, cuts):
    edges = [0, *sorted(cuts), ids.shape[1]]
    return [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


def state_tensors(state):
    return {
        name: getattr(state, name) for name in ("memory", "num_segments", "num_pending", "position")
    }


def pending_tokens(state):
    return [
        row[:count].tolist()
        for row, count in zip(state.pending, state.num_pending.tolist(), strict=True)
    ]


def assert_same_state(mine, theirs):
    close(state_tensors(mine), state_tensors(theirs))
    assert pending_tokens(mine) == pending_tokens(theirs)


CUTS = st.lists(st.integers(0, 31), max_size=5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_a_decoder_streams_in_any_pieces(name, tiny_model, wrap, draw):
    memory_model = wrap(tiny_model(name))
    ids = draw(2, 31)
    targets = draw(2, 31, seed=2)
    whole = memory_model(ids, targets=targets, logits_to_keep=31)

    @example_settings(max_examples=12)
    @given(cuts=CUTS)
    def streamed_is_one_shot(cuts):
        state, logits, losses = memory_model.new_state(2), [], []
        for start, stop in pieces_of(ids, cuts):
            out = memory_model(
                ids[:, start:stop],
                targets=targets[:, start:stop],
                logits_to_keep=stop - start,
                state=state,
            )
            state = state.commit(out.new_entries)
            logits.append(out.logits)
            losses.append(out.token_losses)
        close(torch.cat(logits, dim=1), whole.logits)
        close(torch.cat(losses, dim=1), whole.token_losses)
        assert_same_state(state, memory_model.new_state(2).commit(whole.new_entries))

    with torch.no_grad():
        streamed_is_one_shot()


@pytest.mark.parametrize("name", ["bert", "roberta", "t5"])
def test_other_models_stream_in_any_pieces(name, tiny_model, wrap, draw):
    memory_model = wrap(tiny_model(name), **(BERT_LAYOUT if name != "t5" else {}))
    labels = draw(2, 4, seed=5) if name == "t5" else None
    ids = draw(2, 31)
    with torch.no_grad():
        whole = memory_model(ids, labels=labels)

    @example_settings(max_examples=12)
    @given(cuts=CUTS)
    def streamed_is_one_shot(cuts):
        state = memory_model.new_state(2)
        for start, stop in pieces_of(ids, cuts):
            with torch.no_grad():
                out = memory_model(ids[:, start:stop], labels=labels, state=state)
            state = state.commit(out.new_entries)
        close(out.logits, whole.logits)
        assert_same_state(state, memory_model.new_state(2).commit(whole.new_entries))

    streamed_is_one_shot()


def padded(rows, side, fill=9):
    """Put rows of different lengths into one batch."""
    width = max(len(row) for row in rows) + 2
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width).long()
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


LENGTHS = (23, 5, 14, 1, 22)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@torch.no_grad()
def test_a_ragged_batch_is_its_rows_alone(few_families, alignment, side, wrap, draw):
    memory_model = wrap(few_families.build(), alignment=alignment, **layout(few_families))
    rows = [draw(1, length, seed=length)[0] for length in LENGTHS]
    labels = answers(few_families, draw, len(rows))
    ids, mask = padded(rows, side)
    out = memory_model(ids, attention_mask=mask, labels=labels)
    state = memory_model.new_state(len(rows)).commit(out.new_entries)
    for index, row in enumerate(rows):
        alone = memory_model(row[None], labels=None if labels is None else labels[index][None])
        mine = out.logits[index]
        close(mine[mask[index].bool()] if alone.logits.ndim == 3 and labels is None else mine,
              alone.logits[0])  # fmt: skip
        assert_same_state(
            state.select_rows(torch.tensor([index])),
            memory_model.new_state(1).commit(alone.new_entries),
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_and_no_gradient(side, tiny_model, wrap, draw):
    memory_model = wrap(tiny_model("gpt2"))
    rows = [draw(1, length, seed=length)[0] for length in LENGTHS]
    ids, mask = padded(rows, side)
    memory_model(ids, attention_mask=mask, labels=ids).loss.backward()
    mine = {name: weight.grad.clone() for name, weight in memory_model.named_parameters()}
    memory_model.zero_grad()
    count = sum(len(row) - 1 for row in rows)
    for row in rows:
        if len(row) > 1:
            memory_model(row[None], labels=row[None], num_items_in_batch=count).loss.backward()
    close(mine, {name: weight.grad for name, weight in memory_model.named_parameters()})


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3, None])
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_ragged_batch_has_the_gradients_of_its_rows(
    name, alignment, depth, replay, tiny_model, wrap, draw
):
    # with "right" short rows join late: their first memory lies within the depth and learns
    is_classifier = name == "bert"
    settings = {"alignment": alignment, "bptt_depth": depth, "replay": replay}
    memory_model = wrap(tiny_model(name), **settings, **(BERT_LAYOUT if is_classifier else {}))
    rows = [draw(1, length, seed=length)[0] for length in LENGTHS]
    ids, mask = padded(rows, "right")
    labels = torch.arange(len(rows)) if is_classifier else ids
    memory_model(ids, attention_mask=mask, labels=labels).loss.backward()
    mine = {key: weight.grad.clone() for key, weight in memory_model.named_parameters()}
    memory_model.zero_grad()
    counts = [1 if is_classifier else len(row) - 1 for row in rows]
    for index, row in enumerate(rows):
        if counts[index]:
            alone = labels[index][None] if is_classifier else row[None]
            loss = memory_model(row[None], labels=alone, num_items_in_batch=sum(counts)).loss
            loss.backward()
    close(mine, {key: weight.grad for key, weight in memory_model.named_parameters()})


@torch.no_grad()
def test_a_row_of_padding_keeps_its_memory(tiny_model, wrap, draw):
    memory_model = wrap(tiny_model("llama"))
    state = memory_model.new_state(3)
    state = state.commit(memory_model(draw(3, 17), state=state).new_entries)
    mask = torch.ones(3, 12).long()
    mask[1] = 0
    out = memory_model(draw(3, 12, seed=2), attention_mask=mask, state=state)
    after = state.commit(out.new_entries)
    row = torch.tensor([1])
    assert_same_state(after.select_rows(row), state.select_rows(row))
    assert torch.equal(after.memory[1], state.memory[1])
    assert after.position.tolist() == [29, 17, 29]


@torch.no_grad()
def test_a_batch_of_padding_changes_nothing(tiny_model, wrap, draw):
    memory_model = wrap(tiny_model("llama"))
    state = memory_model.new_state(2)
    state = state.commit(memory_model(draw(2, 17), state=state).new_entries)
    out = memory_model(draw(2, 4), attention_mask=torch.zeros(2, 4).long(), state=state)
    assert_same_state(state.commit(out.new_entries), state)


@torch.no_grad()
def test_rows_join_late_and_change_documents_at_any_step(tiny_model, wrap, draw):
    memory_model = wrap(tiny_model("gpt2"))
    first, second = draw(1, 30, seed=1), draw(1, 18, seed=2)
    # the second row pauses, reads, and begins again while the first reads on
    plan = [(10, None), (10, slice(0, 10)), (4, slice(0, 4)), (6, slice(4, 18))]
    state, place, logits = memory_model.new_state(2), 0, []
    for step, (count, part) in enumerate(plan):
        text = second[0, part] if part is not None else second[0, :0]
        ids, mask = padded([first[0, place : place + count], text], "right")
        starts = torch.tensor([step == 0, step == 2])
        out = memory_model(ids, attention_mask=mask, state=state, document_start=starts)
        state = state.commit(out.new_entries)
        logits.append((out.logits[0, :count], out.logits[1, : len(text)]))
        place += count
    close(torch.cat([mine for mine, _ in logits]), memory_model(first).logits[0])
    close(torch.cat([mine for _, mine in logits[2:]]), memory_model(second).logits[0])


@torch.no_grad()
def test_a_saved_state_goes_on_as_if_nothing_had_happened(few_families, wrap, draw, tmp_path):
    memory_model = wrap(few_families.build(), **layout(few_families))
    labels = answers(few_families, draw, 2)
    ids = draw(2, 31)
    out = memory_model(ids[:, :17], labels=labels)
    state = memory_model.new_state(2).commit(out.new_entries)
    memory_model.save_state(state, tmp_path / "state")
    loaded = memory_model.load_state(tmp_path / "state")
    assert_same_state(loaded, state)
    mine = memory_model(ids[:, 17:], labels=labels, state=loaded).logits
    assert torch.equal(mine, memory_model(ids[:, 17:], labels=labels, state=state).logits)


@torch.no_grad()
def test_forks_and_picked_rows_go_their_own_ways(tiny_model, wrap, draw):
    memory_model = wrap(tiny_model("gpt2"))
    ids = draw(3, 17)
    state = memory_model.new_state(3)
    state = state.commit(memory_model(ids, state=state).new_entries)
    fork = state.fork()
    ends = [draw(3, 12, seed=seed) for seed in (2, 3)]
    for end, start in zip(ends, (state, fork), strict=True):
        out = memory_model(end, state=start)
        close(out.logits, memory_model(torch.cat([ids, end], dim=1)).logits[:, 17:])
    picked = memory_model(ends[0][[2, 0]], state=state.select_rows(torch.tensor([2, 0])))
    close(picked.logits, memory_model(ends[0], state=state).logits[[2, 0]])


@torch.no_grad()
def test_a_pass_changes_neither_state_nor_model(tiny_model, wrap, draw):
    model = tiny_model("gpt2")
    ids = draw(2, 17)
    base = model(input_ids=ids).logits
    memory_model = wrap(model)
    state = memory_model.new_state(2)
    state = state.commit(memory_model(ids, state=state).new_entries)
    copy = state.fork()
    first = memory_model(ids, state=state).logits
    assert torch.equal(memory_model(ids, state=state).logits, first)
    assert_same_state(state, copy)
    assert torch.equal(model(input_ids=ids).logits, base)


@torch.no_grad()
def test_targets_are_labels_moved_by_one(tiny_model, wrap, draw):
    memory_model = wrap(tiny_model("llama"))
    ids, mask = padded([draw(1, length, seed=length)[0] for length in (17, 9)], "left")
    targets = ids.roll(-1, dims=1).masked_fill(mask == 0, -100)
    targets[:, -1] = -100
    by_labels = memory_model(ids, attention_mask=mask, labels=ids)
    by_targets = memory_model(ids, attention_mask=mask, targets=targets)
    assert torch.equal(by_labels.token_losses, by_targets.token_losses)
    close(by_labels.loss, by_labels.token_losses.sum() / (16 + 8))


@torch.no_grad()
def test_token_losses_are_those_of_the_logits(tiny_model, wrap, draw):
    memory_model = wrap(tiny_model("gpt2"))
    ids, targets = draw(2, 17), draw(2, 17, seed=2)
    targets[:, 3:9] = -100
    out = memory_model(ids, targets=targets, logits_to_keep=17)
    expected = torch.nn.functional.cross_entropy(
        out.logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    close(out.token_losses.flatten(), expected)


@pytest.mark.parametrize("kept", [0, 1, 6, 17])
@torch.no_grad()
def test_only_the_wanted_logits_are_returned(kept, tiny_model, wrap, draw):
    memory_model = wrap(tiny_model("gpt2"))
    ids = draw(2, 17)
    out = memory_model(ids, logits_to_keep=kept)
    if kept:
        close(out.logits, memory_model(ids).logits[:, -kept:])
    else:
        assert out.logits is None
    assert memory_model(ids, labels=ids).logits is None


@pytest.mark.parametrize("kept", [1, 4, 9, 16])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_the_wanted_logits_of_ragged_rows_are_those_of_all(kept, side, tiny_model, wrap, draw):
    memory_model = wrap(tiny_model("gpt2"))
    seen = []
    head = memory_model.model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[1]))
    state = memory_model.new_state(4)
    for first in (5, 16):  # the second call has pending tokens before its own
        ids, lengths = draw(4, first, seed=first), torch.tensor([first, 3, first - 1, 1])
        columns = torch.arange(first)
        mask = columns < lengths[:, None]
        mask = mask.flip(1) if side == "left" else mask
        everything = memory_model(ids, attention_mask=mask, state=state)
        seen.clear()
        out = memory_model(ids, attention_mask=mask, state=state, logits_to_keep=min(kept, first))
        assert max(seen) <= max(kept, 1)
        close(out.logits, everything.logits[:, -min(kept, first) :])
        state = state.commit(out.new_entries)


@torch.no_grad()
@torch.no_grad()
def test_the_head_computes_only_what_is_wanted(tiny_model, wrap, draw):
    memory_model, columns = wrap(tiny_model("llama")), []
    memory_model.model.lm_head.register_forward_hook(
        lambda _, inputs, __: columns.append(inputs[0].shape[1])
    )
    for kept, expected in ((0, 0), (1, 1), (9, 9)):
        memory_model(draw(2, 28), logits_to_keep=kept)
        assert sum(columns) == expected
        columns.clear()


def test_a_classifier_has_the_losses_of_its_base_model(tiny_model, wrap, draw):
    ids = draw(3, 7)
    for num_labels, problem, labels in (
        (4, None, torch.tensor([0, 3, 1])),
        (4, None, torch.tensor([0, -100, 1])),
        (1, None, torch.tensor([0.5, -1.0, 2.0])),
        (4, None, torch.rand(3, 4).round()),
        (4, "regression", torch.rand(3, 4)),
        (4, "multi_label_classification", torch.rand(3, 4)),
        (1, "multi_label_classification", torch.rand(3, 1)),
    ):
        model = tiny_model("bert", num_labels=num_labels, problem_type=problem)
        mine = wrap(model, num_memory_tokens=0)(ids, labels=labels).loss
        close(mine, model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize(("kept", "read"), [(0, 2), (1, 3)])
def test_an_unfinished_segment_is_read_only_if_something_is_wanted_of_it(
    kept, read, tiny_model, wrap, draw
):
    memory_model = wrap(tiny_model("gpt2"))
    calls = []
    memory_model.model.register_forward_hook(lambda *_: calls.append(1))

    out = memory_model(draw(2, 2 * 7 + 3), logits_to_keep=kept)

    assert len(calls) == read
    assert out.new_entries.num_segments.tolist() == [2, 2]
    assert out.new_entries.num_pending.tolist() == [3, 3]

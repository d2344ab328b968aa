"""Gradients through the segments of Hugging Face models."""

from functools import partial

import pytest
import torch

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
KINDS = ["gpt2", "llama", "bert", "t5"]


def labels_for(memory_model, ids, draw):
    if memory_model.kind == "decoder":
        return ids
    return torch.arange(len(ids)) if memory_model.kind == "encoder" else draw(len(ids), 4, seed=5)


def gradients(memory_model, batches, draw):
    memory_model.zero_grad()
    torch.manual_seed(11)
    for ids, mask in batches:
        labels = labels_for(memory_model, ids, draw)
        out = memory_model(ids, attention_mask=mask, labels=labels)
        (out.loss / len(batches)).backward()
    return {name: weight.grad for name, weight in memory_model.named_parameters()}


def batches_of(draw, count):
    batches = []
    for seed in range(count):
        mask = torch.ones(3, 31).long()
        mask[0, 9:] = 0
        mask[2, 20:] = 0
        batches.append((draw(3, 31, seed=seed), mask))
    return batches


@pytest.mark.parametrize("depth", [None, 2])
@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize("name", KINDS)
def test_replay_has_the_gradients_of_full_bptt_with_dropout(
    name, alignment, depth, tiny_model, wrap, draw
):
    drop = {"attention_dropout": 0.3} if name == "llama" else {}
    model, batches = tiny_model(name, **drop), batches_of(draw, 2)
    found = []
    for replay in (False, True):
        settings = {"alignment": alignment, "bptt_depth": depth, "noise": 0.1}
        memory_model = wrap(model, replay=replay, **settings).train()
        found.append(gradients(memory_model, batches, draw))
    close(found[1], found[0])


def test_dropout_is_on_in_these_tests(tiny_model, wrap, draw):
    memory_model, ids = wrap(tiny_model("gpt2")).train(), draw(2, 19)
    first = memory_model(ids, labels=ids).loss
    assert memory_model(ids, labels=ids).loss != first


def untied(tiny_model, wrap, **settings):
    return wrap(tiny_model("gpt2", tie_word_embeddings=False), **settings)


def segment_ids(count, per=7):
    """Segment s holds token s alone: the gradient of its embedding is what reaches the segment."""
    return torch.arange(count).repeat_interleave(per)[None]


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 6, None])
def test_each_loss_reaches_bptt_depth_segments(depth, replay, tiny_model, wrap):
    memory_model = untied(tiny_model, wrap, bptt_depth=depth, replay=replay)
    ids = segment_ids(5)
    out = memory_model(ids, targets=ids)
    embeddings = memory_model.model.get_input_embeddings().weight
    for index in range(5):
        loss = out.token_losses[0, 7 * index : 7 * index + 7].sum()
        tokens, memory = torch.autograd.grad(
            loss,
            [embeddings, memory_model.memory.memory],
            retain_graph=True,
            materialize_grads=True,
        )
        first = 0 if depth is None else max(0, index + 1 - depth)
        assert tokens.abs().sum(dim=1).nonzero()[:, 0].tolist() == list(range(first, index + 1))
        assert bool(memory.any()) == (first == 0)


@pytest.mark.parametrize("lengths", [(31, 31), (31, 9), (1, 31), (31, 0)])
def test_a_first_memory_beyond_the_depth_has_no_gradient_at_all(lengths, tiny_model, wrap, draw):
    # zeros would let an optimizer go on by its momentum, and keep the graphs of all segments
    memory_model = wrap(tiny_model("gpt2"), bptt_depth=2)
    mask = torch.arange(31) < torch.tensor(lengths)[:, None]
    ids = draw(2, 31)
    targets = torch.full_like(ids, -100)
    targets[:, -1] = ids[:, -1]
    memory_model(ids, attention_mask=mask.long(), targets=targets).loss.backward()
    assert memory_model.memory.memory.grad is None


@pytest.mark.parametrize("depth", [2, None])
def test_no_gradient_reaches_the_passes_before(depth, tiny_model, wrap):
    memory_model = untied(tiny_model, wrap, bptt_depth=depth)
    ids = segment_ids(4)
    state = memory_model.new_state(1)
    out = memory_model(ids[:, :14], state=state)
    state = state.commit(out.new_entries)
    assert not state.memory.requires_grad
    memory_model(ids[:, 14:], targets=ids[:, 14:], state=state).loss.backward()
    reached = memory_model.model.get_input_embeddings().weight.grad.abs().sum(dim=1)
    assert reached.nonzero()[:, 0].tolist() == [2, 3]
    assert not memory_model.memory.memory.grad.any()


def kept_bytes(memory_model, num_segments, **arguments):
    weights = {weight.data_ptr() for weight in memory_model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(3, 43, (1, 7 * num_segments))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = memory_model(ids, **{name: make(ids) for name, make in arguments.items()})
    assert out.new_entries is not None
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_replay_keeps_far_less_than_full_bptt(name, tiny_model, wrap):
    model = tiny_model(name)
    labels = (lambda ids: ids[:, 0] % 5) if name == "bert" else (lambda ids: ids)
    full = kept_bytes(wrap(model), 32, labels=labels)
    one = kept_bytes(wrap(model), 1, labels=labels)
    replayed = kept_bytes(wrap(model, replay=True), 32, labels=labels)
    assert replayed < one + full / 40


def test_full_bptt_keeps_nothing_of_what_follows_the_last_loss(tiny_model, wrap):
    def first_label(ids):
        return torch.full_like(ids, -100).index_fill_(1, torch.tensor([3]), 5)

    memory_model = wrap(tiny_model("gpt2"), bptt_depth=4)
    assert kept_bytes(memory_model, 32, targets=first_label) <= 1.5 * kept_bytes(
        memory_model, 1, targets=first_label
    )


@torch.no_grad()
def test_reading_keeps_nothing(tiny_model, wrap):
    memory_model = wrap(tiny_model("gpt2"), replay=True)
    assert kept_bytes(memory_model, 16, labels=lambda ids: ids) == 0


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3"])
def test_a_memory_starts_as_large_as_what_the_first_layer_reads(name, tiny_model, wrap):
    model = tiny_model(name)
    read = model.get_input_embeddings()(torch.arange(43)).std(dim=0)
    memory = wrap(model, num_memory_tokens=20).memory.memory
    assert memory.std().item() == pytest.approx(read.mean().item(), rel=0.15)


@pytest.mark.parametrize("settings", [{}, {"update": "gated", "normalize_memory": True}], ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_models_in_half_precision_carry_a_float32_memory(settings, whole, tiny_model, wrap, draw):
    memory_model = wrap(tiny_model("llama").bfloat16(), **settings)
    if whole:
        memory_model.bfloat16()
    ids = draw(2, 19)
    out = memory_model(ids, labels=ids)
    assert out.new_entries.memory.dtype == torch.float32
    out.loss.backward()
    assert memory_model.memory.memory.grad.any()


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_logits_without_labels_reach_bptt_depth_segments(depth, replay, tiny_model, wrap):
    memory_model = untied(tiny_model, wrap, bptt_depth=depth, replay=replay)
    ids = segment_ids(5)
    logits = memory_model(ids).logits
    with torch.no_grad():
        close(logits, wrap(memory_model.model)(ids).logits)
    for index in range(5):
        wanted = [memory_model.model.get_input_embeddings().weight, memory_model.memory.memory]
        tokens, memory = torch.autograd.grad(
            logits[0, 7 * index : 7 * index + 7].square().sum(), wanted,
            allow_unused=True, retain_graph=True,
        )  # fmt: skip
        reached = (tokens[:5].abs().amax(dim=1) > 0).tolist()
        assert reached == [index - depth < place <= index for place in range(5)]
        assert (memory is not None and bool((memory != 0).any())) == (depth > index)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_answers_without_labels_reach_bptt_depth_segments(name, tiny_model, wrap):
    memory_model, ids = wrap(tiny_model(name), bptt_depth=2), segment_ids(5)
    answer = memory_model(ids).logits if name == "bert" else memory_model.encode(ids)[0]
    assert answer.requires_grad
    embeddings = memory_model.model.get_input_embeddings().weight
    tokens, memory = torch.autograd.grad(
        answer.square().sum(), [embeddings, memory_model.memory.memory], allow_unused=True
    )
    assert (tokens[:5].abs().amax(dim=1) > 0).tolist() == [False] * 3 + [True] * 2
    assert memory is None or not bool(memory.any())


@pytest.mark.parametrize("name", KINDS)
def test_a_part_of_a_batch_without_labels_has_the_loss_0(name, tiny_model, wrap, draw):
    # one of several micro-batches, whose loss is divided by the labels of all
    memory_model, ids = wrap(tiny_model(name)), draw(2, 17)
    none = torch.full_like(labels_for(memory_model, ids, draw), -100)
    out = memory_model(ids, labels=none, num_items_in_batch=5)
    assert out.loss == 0
    if memory_model.kind == "decoder":
        assert out.token_losses.shape == ids.shape
        assert not out.token_losses.any()
    out.loss.backward()
    used = [weight for weight in memory_model.parameters() if weight.grad is not None]
    # processes that train together wait for all of them
    assert len(used) == len(list(memory_model.parameters()))
    assert not any(weight.grad.any() for weight in used)

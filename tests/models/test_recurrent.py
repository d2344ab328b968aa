"""Recurrent memory around a model of our own: gradients, replay, and what is kept for them."""

import gc
import itertools
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from byheart.models.recurrent import RecurrentCore
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.window import build_window
from byheart.models.window_model import Encoded, Segment

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
WIDTH, TEXT, MEMORY, ROWS = 13, 5, 3, 2


class TinyModel(nn.Module):
    """One attention layer. Segment s of a document reads the tokens s alone, so that the gradient
    of embedding s tells what reaches segment s."""

    embed_dim = WIDTH
    has_memory = False

    def __init__(self, *, writes=True, dropout=0.0, num_tokens=40):
        super().__init__()
        self.writes = writes
        self.embedding = nn.Embedding(num_tokens, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)
        self.dropout = nn.Dropout(dropout)
        self.requests = []

    def forward(self, window, request):
        self.requests.append(request)
        x = window.embeddings
        scores = self.mix(x) @ x.mT
        if window.mask is not None:
            scores = scores.masked_fill(~window.mask[:, None], -1e9)
        if self.writes:
            ahead = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(ahead, -1e9)
        hidden = torch.tanh(self.out(self.dropout(scores.softmax(dim=-1) @ x + x)))
        if request is None:
            return Encoded(hidden, None)
        text = hidden[:, window.text_start : window.text_start + TEXT]
        return Encoded(hidden, self.head(text).square().sum(dim=(1, 2)))


def make_core(**changes):
    config = RecurrentMemoryConfig(segment_length=TEXT, num_memory_tokens=MEMORY, **changes)
    return RecurrentCore(config, WIDTH, mean=torch.rand(WIDTH), std=1 + torch.rand(WIDTH))


def first_memory(core, rows=ROWS):
    return core.memory.expand(rows, -1, -1)


def make_segments(count, *, losses=None, rows=ROWS):
    """Make segments of which those in `losses` (default: the last) have one."""
    losses = {count - 1} if losses is None else set(losses)
    return [
        Segment(
            input_ids=torch.full((rows, TEXT), index),
            num_tokens=None,
            rows=None,
            writes_memory=None,
            request="loss" if index in losses else None,
            has_loss=index in losses,
        )
        for index in range(count)
    ]


def total_loss(outputs):
    return sum((index + 1) * out.sum() for index, out in enumerate(outputs) if out is not None)


def gradients(core, model, segments, *, seed=None):
    core.zero_grad(), model.zero_grad()
    if seed is not None:
        torch.manual_seed(seed)
    outputs, memory, *_ = core.unroll(model, segments, first_memory(core))
    total_loss(outputs).backward()
    named = itertools.chain(core.named_parameters(), model.named_parameters())
    grads = {name: weight.grad.clone() for name, weight in named if weight.grad is not None}
    return grads, total_loss(outputs).detach(), memory.detach()


def reached(core, model, loss):
    """Tell which segments a loss reaches, and whether it reaches the learned memory."""
    weights = [model.embedding.weight, core.memory]
    tokens, memory = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
    return tokens.abs().sum(dim=1).nonzero()[:, 0].tolist(), bool(memory.any())


DEPTHS = [1, 2, 3, 5, 6, 9, None]


def inside(index, depth):
    return list(range(0 if depth is None else max(0, index + 1 - depth), index + 1))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("replay", [True, False])
def test_the_last_loss_reaches_bptt_depth_segments(depth, writes, replay):
    core, model = make_core(bptt_depth=depth, replay=replay), TinyModel(writes=writes)
    outputs = core.unroll(model, make_segments(6), first_memory(core)).outputs
    tokens, memory = reached(core, model, outputs[-1].sum())
    assert tokens == inside(5, depth)
    assert memory == (0 in tokens)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("replay", [True, False])
def test_each_loss_alone_reaches_bptt_depth_segments(depth, replay):
    core, model = make_core(bptt_depth=depth, replay=replay), TinyModel()
    outputs = core.unroll(model, make_segments(6, losses=range(6)), first_memory(core)).outputs
    for index, out in enumerate(outputs):
        tokens, memory = reached(core, model, out.sum())
        assert tokens == inside(index, depth)
        assert memory == (0 in tokens)


def unroll_and_detach_by_hand(core, model, segments, depth):
    """Unroll anew for each loss, with a memory that is detached where the depth ends."""
    outputs = []
    for index, segment in enumerate(segments):
        if not segment.has_loss:
            outputs.append(None)
            continue
        memory = first_memory(core)
        for place, other in enumerate(segments[: index + 1]):
            if depth is not None and index - place == depth - 1 and place > 0:
                memory = memory.detach()
            window = build_window(
                core.config, model.embedding, memory, other.input_ids, None, writes=True
            )
            encoded = model(window, "loss")
            memory = encoded.hidden[:, -MEMORY:]
        outputs.append(encoded.output)
    return outputs


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("losses", [[6], [0, 1, 2, 3, 4, 5, 6], [0, 5], [1, 2, 6], [2]])
def test_truncation_is_detaching_by_hand(depth, losses):
    core, model = make_core(bptt_depth=depth), TinyModel()
    segments = make_segments(7, losses=losses)
    mine, _, _ = gradients(core, model, segments)
    core.zero_grad(), model.zero_grad()
    total_loss(unroll_and_detach_by_hand(core, model, segments, depth)).backward()
    named = itertools.chain(core.named_parameters(), model.named_parameters())
    # a learned memory out of reach has no gradient, or one of zeros
    theirs = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in named
    }
    mine = {name: mine.get(name, torch.zeros_like(grad)) for name, grad in theirs.items()}
    # sums over segments are taken in another order
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("losses", [[6], [0, 3, 4], [2]])
def test_truncation_changes_no_output_and_no_memory(losses):
    model, segments = TinyModel(), make_segments(7, losses=losses)
    core = make_core()
    full = core.unroll(model, segments, first_memory(core))
    for depth in (1, 2, 4):
        other = make_core(bptt_depth=depth)
        other.load_state_dict(core.state_dict())
        outputs, memory, *_ = other.unroll(model, segments, first_memory(other))
        close(memory, full.memory)
        for mine, theirs in zip(outputs, full.outputs, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                close(mine, theirs)


VARIANTS = [
    {},
    {"noise": 0.3},
    {"update": "gated"},
    {"normalize_memory": True},
    {"bptt_depth": 2},
    {"bptt_depth": 3, "update": "gated", "normalize_memory": True, "noise": 0.3},
]


def assert_same_gradients(mine, theirs):
    """Compare to 1e-6 of the largest number: losses that share segments are summed in turns."""
    assert mine[0].keys() == theirs[0].keys()
    pairs = zip((*mine[0].values(), *mine[1:]), (*theirs[0].values(), *theirs[1:]), strict=True)
    for one, other in pairs:
        bound = 1e-6 * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("losses", [[6], [0, 3, 6], range(7)])
def test_replay_is_full_bptt(settings, dropout, losses):
    full, replay = make_core(**settings), make_core(**settings, replay=True)
    replay.load_state_dict(full.state_dict())
    model, segments = TinyModel(dropout=dropout), make_segments(7, losses=losses)
    mine = gradients(replay, model, segments, seed=11)
    assert_same_gradients(mine, gradients(full, model, segments, seed=11))
    other = gradients(replay, model, segments, seed=12)
    assert (dropout or settings.get("noise", 0)) == 0 or not torch.equal(mine[1], other[1])


def test_replay_accumulates_over_batches_like_full_bptt():
    full, replay, model = make_core(), make_core(replay=True), TinyModel(dropout=0.4)
    replay.load_state_dict(full.state_dict())
    found = []
    for core in (full, replay):
        core.zero_grad(), model.zero_grad()
        torch.manual_seed(5)
        # both batches are read before the first backward pass
        losses = [
            total_loss(core.unroll(model, make_segments(count), first_memory(core)).outputs)
            for count in (4, 7)
        ]
        for loss in losses:
            loss.backward()
        named = itertools.chain(core.named_parameters(), model.named_parameters())
        found.append({name: weight.grad for name, weight in named})
    close(*found)


def test_replay_leaves_the_random_state_as_full_bptt_does():
    states = []
    for replay in (False, True):
        core, model = make_core(replay=replay), TinyModel(dropout=0.4)
        gradients(core, model, make_segments(5), seed=7)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def kept_bytes(core, model, segments):
    """Count the bytes that autograd keeps for the backward pass, weights aside."""
    weights = {weight.data_ptr() for weight in [*core.parameters(), *model.parameters()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs, memory, *_ = core.unroll(model, segments, first_memory(core))
    assert memory is not None
    assert outputs[-1] is not None
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("writes", [True, False])
def test_replay_keeps_the_memory_between_segments_and_the_last_segment(writes):
    model, full, replay = TinyModel(writes=writes), make_core(), make_core(replay=True)
    memory = 4 * ROWS * MEMORY * WIDTH
    one = kept_bytes(full, model, make_segments(1))
    for count in (2, 32):
        kept = kept_bytes(replay, model, make_segments(count))
        assert count * memory < kept <= (count + 1) * memory + one
    assert kept < one + kept_bytes(full, model, make_segments(32)) / 10


def test_replay_of_losses_that_reach_a_depth_keeps_no_segment():
    segments = make_segments(32, losses=range(32))
    kept = kept_bytes(make_core(replay=True, bptt_depth=4), TinyModel(), segments)
    assert kept == 4 * ROWS * MEMORY * WIDTH * (1 + 2 + 3 + 29 * 4)


def test_replay_reads_every_segment_twice_but_the_last():
    core, model = make_core(replay=True), TinyModel()
    outputs = core.unroll(model, make_segments(7), first_memory(core)).outputs
    assert len(model.requests) == 7
    outputs[-1].sum().backward(retain_graph=True)
    assert len(model.requests) == 7 + 6
    once = core.memory.grad.clone()
    core.zero_grad()
    # what was kept is gone after the first time
    outputs[-1].sum().backward()
    assert len(model.requests) == 7 + 6 + 7
    close(core.memory.grad, once)


@pytest.mark.parametrize("losses", [[0], [6]])
@pytest.mark.parametrize("backward", [True, False])
def test_replay_lets_go_of_the_last_segment(losses, backward):
    seen = []

    class Watched(TinyModel):
        def forward(self, window, request):
            encoded = super().forward(window, request)
            # nothing of the last segment beside one that is read again
            assert len(seen) < 7 or seen[6]() is None
            seen.append(weakref.ref(encoded.hidden))
            return encoded

    core, model = make_core(replay=True), Watched()
    gc.disable()
    try:
        result = core.unroll(model, make_segments(7, losses=losses), first_memory(core))
        last = seen[6]
        if backward:
            assert last() is not None
            result.outputs[losses[0]].sum().backward()
        else:
            del result
        assert last() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward behind"])
def test_replay_is_full_bptt_under_autocast(inside):
    full, replay, model = make_core(), make_core(replay=True), TinyModel(dropout=0.4)
    replay.load_state_dict(full.state_dict())
    found = []
    for core in (full, replay):
        core.zero_grad(), model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            segments = make_segments(5, losses=[2, 4])
            loss = total_loss(core.unroll(model, segments, first_memory(core)).outputs)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        named = itertools.chain(core.named_parameters(), model.named_parameters())
        found.append({name: weight.grad for name, weight in named})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        # gradients of half precision, summed in another order
        bound = 0.02 * grad.abs().max().item()
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=bound)


def test_a_depth_keeps_what_the_segments_in_reach_need():
    model, core = TinyModel(), make_core(bptt_depth=4)
    four = kept_bytes(make_core(), model, make_segments(4))
    assert kept_bytes(core, model, make_segments(32)) <= 1.1 * four


@torch.no_grad()
def test_reading_keeps_nothing():
    core, segments = make_core(), make_segments(32)
    outputs, memory, *_ = core.unroll(TinyModel(), segments, torch.zeros(2, 3, WIDTH))
    assert outputs[:-1] == [None] * 31
    assert not memory.requires_grad
    assert kept_bytes(make_core(), TinyModel(), make_segments(32)) == 0


def test_segments_without_a_loss_ask_for_nothing():
    core, model = make_core(bptt_depth=2), TinyModel()
    core.unroll(model, make_segments(5, losses=[2, 3]), first_memory(core))
    # segment 0 without a gradient; 1 and 2; 2 and 3, of which the loss of 2 is known; 4 without
    assert model.requests == [None, None, "loss", None, "loss", None]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_each_segment_is_read_at_most_bptt_depth_times_and_asked_once(depth):
    core, model = make_core(bptt_depth=depth), TinyModel()
    core.unroll(model, make_segments(9, losses=range(9)), first_memory(core))
    assert model.requests.count("loss") == 9
    assert len(model.requests) <= 9 * depth


def test_rows_that_are_not_named_keep_their_memory():
    core, model = make_core(), TinyModel()
    memory = torch.randn(3, MEMORY, WIDTH)
    some = make_segments(1, rows=2)[0]
    picked = Segment(
        input_ids=some.input_ids,
        num_tokens=None,
        rows=torch.tensor([2, 0]),
        writes_memory=torch.tensor([True, False]),
        request=None,
        has_loss=False,
    )
    after = core.unroll(model, [picked], memory).memory
    assert torch.equal(after[:2], memory[:2])
    alone = core.step(model, some, memory[[2, 2]]).memory
    close(after[2], alone[0])


def test_a_short_row_is_its_text_alone():
    for writes, specials in ((True, {}), (False, {"start_ids": (20,), "end_ids": (21, 22)})):
        core, model = make_core(**specials), TinyModel(writes=writes)
        memory = torch.randn(2, MEMORY, WIDTH)
        together = Segment(
            input_ids=torch.arange(10).view(2, 5),
            num_tokens=torch.tensor([2, 5]),
            rows=None,
            writes_memory=None,
            request=None,
            has_loss=False,
        )
        mine = core.step(model, together, memory).memory
        for row, length in ((0, 2), (1, 5)):
            alone = Segment(
                input_ids=together.input_ids[row, None, :length],
                num_tokens=None,
                rows=None,
                writes_memory=None,
                request=None,
                has_loss=False,
            )
            close(mine[row], core.step(model, alone, memory[row, None])[0][0])


def test_memory_tokens_start_apart_and_as_large_as_embeddings():
    config = RecurrentMemoryConfig(segment_length=TEXT, num_memory_tokens=50)
    core = RecurrentCore(config, 64, mean=torch.zeros(64), std=torch.full((64,), 0.02))
    assert core.memory.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.pdist(core.memory).min() > 0.1


@pytest.mark.parametrize(("bias", "kept"), [(-100.0, True), (100.0, False)])
def test_the_gate_keeps_or_replaces(bias, kept):
    gated, plain = make_core(update="gated", gate_bias_init=bias), make_core()
    model, segment = TinyModel(), make_segments(1)[0]
    memory = torch.randn(ROWS, MEMORY, WIDTH)
    replaced = plain.step(model, segment, memory).memory
    close(gated.step(model, segment, memory)[0], memory if kept else replaced)


@pytest.mark.parametrize(("bias", "share"), [(-3.0, 0.0), (3.0, 1.0)])
def test_a_gate_closes_and_opens_completely(bias, share):
    gated, plain = make_core(update="gated", gate_bias_init=bias).eval(), make_core()
    model, segments, memory = TinyModel(), make_segments(4), torch.randn(ROWS, MEMORY, WIDTH)
    after = gated.unroll(model, segments, memory)
    assert torch.equal(
        after.memory, plain.unroll(model, segments, memory).memory if share else memory
    )
    assert after.write_share == share
    assert plain.unroll(model, segments, memory).write_share is None


def test_a_step_says_how_far_the_gate_of_each_memory_token_opened():
    core = make_core(update="gated", gate_bias_init=0.3).eval()
    core.gate.weight.data.normal_()
    model, segment = TinyModel(), make_segments(1)[0]
    memory = torch.randn(ROWS, MEMORY, WIDTH)
    with torch.no_grad():
        after, _, _, opened = core.step(model, segment, memory)
        plain = RecurrentCore(replace(core.config, update="replace", gate_bias_init=-2.0), WIDTH,
                              mean=torch.zeros(WIDTH), std=torch.ones(WIDTH))  # fmt: skip
        written = plain.step(model, segment, memory).memory
    close(after, memory + opened[..., None] * (written - memory))
    assert opened.std() > 0.01
    partly = replace(segment, writes_memory=torch.tensor([True, False]))
    close(core.step(model, partly, memory).opened, opened * torch.tensor([[1.0], [0.0]]))
    assert plain.step(model, segment, memory).opened is None


@pytest.mark.parametrize(("noise", "learns"), [(0.0, False), (1.0, True)])
def test_noise_lets_a_closed_gate_learn(noise, learns):
    torch.manual_seed(0)
    core = make_core(update="gated", gate_bias_init=-3.0, gate_noise=noise)
    after = core.unroll(TinyModel(), make_segments(4, rows=50), first_memory(core, 50))
    after.write_share.backward()
    assert bool(core.gate.bias.grad != 0) == learns


@pytest.mark.parametrize("settings", [{}, {"bptt_depth": 9}, {"bptt_depth": 3}], ids=str)
@pytest.mark.parametrize("losses", [[6], [0, 3, 6], range(7)])
def test_what_was_rewritten_is_the_same_however_it_is_computed(settings, losses):
    gate = {"update": "gated", "gate_bias_init": 0.5, "gate_noise": 0.0}
    full, other = make_core(**gate), make_core(**gate, **settings, replay=True)
    full.gate.weight.data.normal_()
    other.load_state_dict(full.state_dict())
    model, segments = TinyModel(), make_segments(7, losses=losses)
    shares = [
        core.unroll(model, segments, first_memory(core)).write_share for core in (full, other)
    ]
    assert 0.05 < shares[0].item() < 0.95
    if settings.get("bptt_depth") == 3 and losses == [6]:
        # a loss out of whose reach they are says nothing about the first four
        before = full.unroll(model, segments[:4], first_memory(full)).memory
        shares[0] = full.unroll(model, segments[4:], before).write_share
    close(*shares)
    if "bptt_depth" not in settings or settings["bptt_depth"] == 9:
        grads = [
            torch.autograd.grad(share, [core.gate.weight, core.memory, model.embedding.weight])
            for share, core in zip(shares, (full, other), strict=True)
        ]
        for mine, theirs in zip(*grads, strict=True):
            close(mine, theirs)


def test_rows_that_write_nothing_do_not_count_as_rewritten():
    core = make_core(update="gated", gate_bias_init=0.0).eval()
    whole, partly = make_segments(2)
    partly = replace(partly, writes_memory=torch.tensor([True] + [False] * (ROWS - 1)))
    share = core.unroll(TinyModel(), [whole, partly], first_memory(core)).write_share
    assert share.item() == pytest.approx(0.5)
    nothing = replace(whole, writes_memory=torch.zeros(ROWS, dtype=torch.bool))
    assert core.unroll(TinyModel(), [nothing], first_memory(core)).write_share == 0


def test_a_normalised_memory_starts_as_large_as_embeddings():
    torch.manual_seed(1)
    core = make_core(normalize_memory=True)
    core.norm.weight.data.fill_(0.02)
    core.norm.bias.data.fill_(0.5)
    memory, *_ = core.step(TinyModel(), make_segments(1)[0], first_memory(core))
    close(memory.mean(dim=-1), torch.full((ROWS, MEMORY), 0.5))
    close(memory.std(dim=-1, correction=0), torch.full((ROWS, MEMORY), 0.02), atol=1e-4)


def test_noise_is_relative_and_only_for_training():
    core, model, segment = make_core(noise=0.5), TinyModel(), make_segments(1, rows=200)[0]
    memory = first_memory(core, 200)
    core.eval()
    quiet = core.step(model, segment, memory).memory
    assert torch.equal(quiet, core.step(model, segment, memory)[0])
    core.train()
    noise = core.step(model, segment, memory)[0] - quiet
    assert (noise.std() / quiet[0].std()).item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("settings", [*VARIANTS, {"replay": True, "update": "gated"}], ids=str)
def test_the_memory_stays_float32_under_autocast(settings):
    core, model = make_core(**settings), TinyModel()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, memory, *_ = core.unroll(model, make_segments(3), first_memory(core))
    assert memory.dtype == torch.float32
    total_loss(outputs).backward()
    assert all(p.grad.isfinite().all() for p in core.parameters() if p.grad is not None)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_memory_stays_float32_beside_half_weights(settings):
    core, model = make_core(**settings).bfloat16(), TinyModel().bfloat16()
    memory = first_memory(core).float()
    outputs, memory, *_ = core.unroll(model, make_segments(3), memory)
    assert memory.dtype == torch.float32
    total_loss(outputs).backward()


def test_no_memory_tokens_are_no_memory():
    config = RecurrentMemoryConfig(segment_length=TEXT, num_memory_tokens=0, update="gated")
    core = RecurrentCore(config, WIDTH, mean=torch.zeros(WIDTH), std=torch.ones(WIDTH))
    outputs, memory, *_ = core.unroll(TinyModel(), make_segments(3), torch.zeros(ROWS, 0, WIDTH))
    assert memory.shape == (ROWS, 0, WIDTH)
    assert outputs[-1].shape == (ROWS,)

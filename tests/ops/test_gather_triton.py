"""The kernels of attention over retrieved entries: compiled on a GPU, else interpreted."""

import pytest
import torch
from interpreted import interpret_fast

from byheart.ops import gather_triton, reference
from byheart.ops.attention import EXCLUDED
from byheart.ops.gather import gather_attend
from byheart.ops.search import Neighbours
from byheart.ops.search_select import EXCLUDED as EXCLUDED_SCORE

CUDA = torch.cuda.is_available()
# the interpreter of 3.6 fails with NumPy 2.4
pytest.importorskip("triton", minversion="3.6" if CUDA else "3.7")
if not CUDA:
    interpret_fast()

DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = [pytest.mark.gpu] if CUDA else []

# few queries: the interpreter takes milliseconds for each
BATCH, HEADS, KV_HEADS, QUERIES, ENTRIES, TOP_K, HEAD_DIM = 3, 4, 2, 2, 23, 7, 13


@pytest.fixture(autouse=True)
def attended(monkeypatch):
    """Let kernels attend on any device; counts how often they did."""
    calls, apply = [], gather_triton.KernelGatherAttend.apply

    def spy(*arguments):
        calls.append(1)
        return apply(*arguments)

    monkeypatch.setattr(gather_triton.KernelGatherAttend, "apply", spy)
    monkeypatch.setattr(gather_triton, "uses_kernels", lambda *_: True)
    return calls


def make_inputs(dtype=torch.float32, stored=None, *, top_k=TOP_K, head_dim=HEAD_DIM):
    """Queries, scale, keys, values and neighbours; a row is empty, another has too few entries."""
    queries = torch.randn(BATCH, HEADS, QUERIES, head_dim, device=DEVICE).to(dtype)
    scale = (torch.rand(HEADS, device=DEVICE) + 0.5).requires_grad_()
    keys, values = torch.randn(2, BATCH, KV_HEADS, ENTRIES, head_dim, device=DEVICE).to(
        stored or dtype
    )
    present = torch.arange(ENTRIES, device=DEVICE) < torch.tensor(
        [[0], [max(1, top_k - 4)], [ENTRIES]], device=DEVICE
    )
    repeated = keys.float().repeat_interleave(HEADS // KV_HEADS, dim=1)
    scores = queries.float() @ repeated.transpose(-1, -2)
    scores, slots = scores.masked_fill(~present[:, None, None], EXCLUDED_SCORE).topk(top_k)
    valid = scores > EXCLUDED_SCORE
    found = Neighbours(scores, slots.masked_fill(~valid, 0), valid)
    return queries.requires_grad_(), scale, keys, values, found


def slow_twin(queries, scale, keys, values, found, bias=None, empty_as_zero=False):
    """Attend in float64 on the CPU, which also decides what the gradients are."""
    sides = [x.detach().cpu().double() for x in (queries, scale, keys, values)]
    sides[0].requires_grad_()
    sides[1].requires_grad_()
    found = Neighbours(*(x.cpu() for x in found))
    bias = None if bias is None else bias.cpu().double()
    attended = reference.gather_attend(*sides, found, bias=bias, empty_as_zero=empty_as_zero)
    return attended, sides[:2]


def assert_equals_twin(inputs, bias=None, empty_as_zero=False, rtol=1e-5, atol=1e-5):
    queries, scale = inputs[:2]
    fast = gather_attend(*inputs, bias=bias, empty_as_zero=empty_as_zero)
    slow, leaves = slow_twin(*inputs, bias, empty_as_zero)
    assert fast.output.dtype == queries.dtype
    assert fast.logsumexp.dtype == torch.float32
    close = {"rtol": rtol, "atol": atol, "check_dtype": False}
    weights = [torch.randn_like(side) for side in slow]
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs, **close)
    mine = torch.autograd.grad(
        fast, (queries, scale), [w.to(x) for w, x in zip(weights, fast, strict=True)]
    )
    theirs = torch.autograd.grad(slow, leaves, weights)
    for one, other in zip(mine, theirs, strict=True):
        # sums of terms that cancel, of scores that were rounded to float32 by the search
        scaled = {**close, "atol": 5 * atol * max(1.0, float(other.abs().amax()))}
        torch.testing.assert_close(one.cpu().double(), other, **scaled)


@pytest.mark.parametrize("empty_as_zero", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_its_twin(attended, biased, empty_as_zero):
    inputs = make_inputs()
    bias = torch.randn_like(inputs[4].scores) if biased else None
    assert_equals_twin(inputs, bias, empty_as_zero)
    assert attended


@pytest.mark.parametrize("head_dim", [16, 48, 80, 128])
def test_any_width_of_a_head(head_dim):
    assert_equals_twin(make_inputs(head_dim=head_dim))


@pytest.mark.parametrize("top_k", [1, 16, 23])
def test_any_number_of_neighbours(top_k):
    assert_equals_twin(make_inputs(top_k=top_k))


@pytest.mark.parametrize(
    "stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_narrow_memory_is_read_in_float32(stored):
    assert_equals_twin(make_inputs(torch.float32, stored))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_and_gradient_have_the_dtype_of_the_queries(dtype):
    # only the results are rounded: to 8 or 11 bits
    assert_equals_twin(make_inputs(dtype), rtol=2.0**-7, atol=2.0**-7)


def test_row_without_entries_gives_zeros_and_no_gradient():
    queries, scale, keys, values, found = make_inputs()
    attended = gather_attend(queries, scale, keys, values, found)
    assert (attended.output[0] == 0).all()
    assert (attended.logsumexp[0] == EXCLUDED).all()
    total = attended.output[0].sum() + attended.logsumexp[0].sum()
    for gradient in torch.autograd.grad(total, (queries, scale)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("empty_as_zero", [False, True])
def test_what_empty_slots_hold_does_not_matter(empty_as_zero):
    queries, scale, keys, values, found = make_inputs()
    arguments = {"empty_as_zero": empty_as_zero}

    def results():
        attended = gather_attend(queries, scale, keys, values, found, **arguments)
        return [*attended, *torch.autograd.grad(attended.output.sum(), (queries, scale))]

    # no neighbour of the first row is valid, and those of the second are the first slots
    keys[0], values[0], keys[1, :, TOP_K - 4 :], values[1, :, TOP_K - 4 :] = 0.0, 0.0, 0.0, 0.0
    before = results()
    for side in (keys, values):
        side[0] = torch.nan
        side[1, :, TOP_K - 4 :] = torch.inf
    assert all(map(torch.equal, results(), before))


def test_large_scores_do_not_overflow():
    queries, scale, keys, values, found = make_inputs()
    found = found._replace(scores=torch.where(found.valid, found.scores * 1e4, found.scores))
    attended = gather_attend(queries, scale, keys, values, found)
    weights = torch.softmax(found.scores[2].double() * scale[:, None, None], dim=-1)
    kv_heads = torch.arange(HEADS, device=DEVICE) // (HEADS // KV_HEADS)
    picked = values[2, kv_heads[:, None, None], found.slots[2]].double()
    expected = (weights[..., None] * picked).sum(-2)
    torch.testing.assert_close(attended.output[2].double(), expected, rtol=1e-4, atol=1e-4)


def test_memory_gets_no_gradient():
    queries, scale, keys, values, found = make_inputs()
    keys.requires_grad_()
    values.requires_grad_()
    gather_attend(queries, scale, keys, values, found).output.sum().backward()
    assert keys.grad is None
    assert values.grad is None
    assert queries.grad.abs().sum() > 0


@pytest.mark.parametrize("overwritten", [2, 3], ids=["keys", "values"])
def test_backward_refuses_a_memory_that_was_written_since(overwritten):
    inputs = make_inputs()
    output = gather_attend(*inputs).output
    inputs[overwritten][:, :, 0] = 0.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_tensors_of_any_memory_format_are_read_right():
    queries, scale, keys, values, found = make_inputs()

    def permuted(x):
        return x.detach().transpose(0, 2).contiguous().transpose(0, 2)

    strange = (permuted(queries).requires_grad_(), scale, permuted(keys), permuted(values))
    assert_equals_twin((*strange, Neighbours(*map(permuted, found))))


def test_no_queries_give_no_output():
    queries, scale, keys, values, found = make_inputs()
    nothing = Neighbours(*(x[:, :, :0] for x in found))
    none = queries[:, :, :0]
    attended = gather_attend(none, scale, keys, values, nothing)
    assert attended.output.shape == none.shape
    attended.output.sum().backward()


def test_both_directions_are_operators_that_compilers_need_not_trace():
    queries, scale, keys, values, found = make_inputs()
    checks = ("test_schema", "test_faketensor")
    queries, scale = queries.detach(), scale.detach()
    for bias in (None, torch.randn_like(found.scores)):
        forward = (queries, scale, values, *found, bias, False)
        torch.library.opcheck(torch.ops.byheart.gather_attend.default, forward, test_utils=checks)
        output, logsumexp = torch.ops.byheart.gather_attend(*forward)
        backward = (output, logsumexp, logsumexp, queries, scale, keys, values, *found, bias, False)
        torch.library.opcheck(
            torch.ops.byheart.gather_attend_backward.default, backward, test_utils=checks
        )


def test_types_that_kernels_do_not_know_are_left_to_pytorch(attended):
    queries, scale, keys, values, found = make_inputs()
    wide = [x.detach().double() for x in (queries, scale, keys, values)]
    gather_attend(*wide, found._replace(scores=found.scores.double()))
    assert not attended


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_realistic_sizes_on_a_gpu(stored, monkeypatch):
    queries = torch.randn(2, 8, 251, 64, device="cuda", requires_grad=True)
    scale = (torch.rand(8, device="cuda") + 0.5).requires_grad_()
    keys, values = torch.randn(2, 2, 4, 65_521, 64, device="cuda").to(stored)
    slots = torch.randint(65_521, (2, 8, 251, 32), device="cuda")
    heads = torch.arange(8, device="cuda")[:, None, None] // 2
    rows = torch.arange(2, device="cuda")[:, None, None, None]
    scores = (keys[rows, heads, slots].float() * queries.detach()[..., None, :]).sum(-1)
    found = Neighbours(scores, slots, torch.rand(slots.shape, device="cuda") < 0.9)

    def results():
        attended = gather_attend(queries, scale, keys, values, found)
        total = (attended.output * attended.output.detach().cos()).sum() + attended.logsumexp.sum()
        return [*attended, *torch.autograd.grad(total, (queries, scale))]

    fast = results()
    monkeypatch.setattr(gather_triton, "uses_kernels", lambda *_: False)
    for mine, theirs in zip(fast, results(), strict=True):
        # float32 sums in another order
        torch.testing.assert_close(
            mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().amax())
        )

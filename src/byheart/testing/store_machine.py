"""The state machine behind `store_contract`. Only this module imports hypothesis."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from byheart.errors import MemoryStateError
from byheart.memory.store import MemoryStore
from byheart.ops.attention import EXCLUDED
from byheart.ops.search import Neighbours

_HEAD_DIM = 5
_NUM_QUERIES = 3


class Row(NamedTuple):
    """What one row of a store should hold."""

    num_written: int
    """Entries written since the last reset."""
    pairs: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of the newest entries, oldest first: `[kv_heads, head_dim]` each."""


class Branch(NamedTuple):
    """A store and what it should hold."""

    store: MemoryStore
    rows: tuple[Row, ...]


class StoreMachine(RuleBasedStateMachine):
    """Does random things to a store and to a list of pairs, and compares them."""

    make_store: ClassVar[Callable[[int, int, int, int], MemoryStore]]
    exact: ClassVar[bool]
    minimum_recall: ClassVar[float]

    def __init__(self) -> None:
        super().__init__()
        self.other: Branch | None = None
        self.saved: tuple[dict[str, Tensor], tuple[Row, ...]] | None = None
        # all numbers come from one generator: a sequence of calls repeats them
        self.generator = torch.Generator().manual_seed(0)
        self.num_checks = 0

    @initialize(
        batch_size=st.integers(1, 3), kv_heads=st.integers(1, 2), memory_size=st.integers(1, 11)
    )
    def start(self, batch_size: int, kv_heads: int, memory_size: int) -> None:
        """Begin with an empty store."""
        self.kv_heads, self.memory_size = kv_heads, memory_size
        self.now = Branch(self.new_store(batch_size), (Row(0, ()),) * batch_size)

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        """Write entries, any number with any mask; then the old store must refuse."""
        num_entries = data.draw(st.integers(0, 2 * self.memory_size + 1), label="entries")
        everything = 2**num_entries - 1
        masks = st.one_of(st.just(everything), st.integers(0, everything))
        drawn = [data.draw(masks, label="kept entries (bits)") for _ in self.now.rows]
        keep = torch.tensor([[bool(mask >> n & 1) for n in range(num_entries)] for mask in drawn])
        self.write(keep.view(len(drawn), num_entries).bool())

    def write(self, keep: Tensor) -> None:
        """Write random entries."""
        store, rows = self.now
        keys, values = (
            self.draw(len(rows), self.kv_heads, keep.shape[1], _HEAD_DIM) for _ in range(2)
        )
        written = store.append(self.on(keys.requires_grad_()), self.on(values), self.on(keep))
        for call in (store.state_dict, store.fork, lambda: self.search(store, len(rows), 1)):
            _assert_refused(call)
        self.now = Branch(
            written,
            tuple(
                self.extended(row, keys[b].detach(), values[b], keep[b])
                for b, row in enumerate(rows)
            ),
        )

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        """Forget some rows; the store it was called on must stay as it was."""
        store, rows = self.now
        mask = torch.tensor([data.draw(st.booleans(), label="reset") for _ in rows])
        after = store.reset(self.on(mask))
        self.check(self.now, top_k=self.memory_size)
        kept = (Row(0, ()) if gone else row for gone, row in zip(mask.tolist(), rows, strict=True))
        self.now = Branch(after, tuple(kept))

    @rule(data=st.data())
    def select_rows(self, data: st.DataObject) -> None:
        """Continue with a choice of rows; the store they came from is kept for comparison."""
        store, rows = self.now
        ids = data.draw(
            st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4), label="ids"
        )
        selected = store.select_rows(self.on(torch.tensor(ids)))
        self.branch_off(Branch(selected, tuple(rows[i] for i in ids)), data)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Continue with a copy; the original is kept for comparison."""
        self.branch_off(Branch(self.now.store.fork(), self.now.rows), data)

    def branch_off(self, copy: Branch, data: st.DataObject) -> None:
        """Continue with a copy that must answer the same and, overwritten, change nothing else."""
        self.other, self.now = self.now, copy
        self.check(copy, self.memory_size)
        if data.draw(st.booleans(), label="overwrite the copy"):
            self.write(torch.ones(len(copy.rows), self.memory_size, dtype=torch.bool))

    @rule()
    def save(self) -> None:
        """Keep the tensors of the store; a store filled from them must answer the same."""
        store, rows = self.now
        self.saved = (store.state_dict(), rows)
        self.check(self.loaded(), self.memory_size)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        """Continue with a store filled from the tensors kept last, whatever happened since."""
        self.other, self.now = self.now, self.loaded()

    @precondition(lambda self: self.other is not None)
    @rule()
    def continue_with_the_other(self) -> None:
        """Change sides between a copy and its original."""
        assert self.other is not None
        self.now, self.other = self.other, self.now

    @rule()
    def move(self) -> None:
        """Move the store to where it is."""
        store, rows = self.now
        self.now = Branch(store.to(store.num_written.device), rows)

    @rule(top_k=st.integers(1, 11), age_slope=st.sampled_from([0.0, 0.5]))
    def attend(self, top_k: int, age_slope: float) -> None:
        """Attend, and compare output, denominator and gradients with the listed pairs."""
        store, rows = self.now
        heads = 2 * self.kv_heads
        queries = self.draw(len(rows), heads, _NUM_QUERIES, _HEAD_DIM).requires_grad_()
        scale = (2 + self.draw(heads)).requires_grad_()
        top_k = min(top_k, self.memory_size)
        read = store.attend(self.on(queries), self.on(scale), top_k, age_slope)
        has_entries = [bool(row.pairs) for row in rows]
        assert read.has_entries.tolist() == has_entries, f"has_entries must be {has_entries}."
        if read.found is not None:
            entries = self.entries_found(self.now, read.found)
        else:
            entries = _every_entry(rows, heads, top_k)
        logits = [_logits(queries[b], scale, row, age_slope) for b, row in enumerate(rows)]
        self.check_recall(logits, entries, top_k, "Clause 8: attend must read what weighs most")
        outputs, logsumexps = _attend_to_pairs(queries, scale, rows, entries, age_slope)
        for mine, theirs, what in (
            (read.output, outputs, "output"),
            (read.logsumexp, logsumexps, "logsumexp"),
        ):
            _assert_close(mine.cpu(), theirs, f"attend must return the {what} over what was found")
        # without an entry nothing depends on the queries, and there may be no graph
        if any(row.pairs for row in rows):
            gradients = [
                torch.autograd.grad(side.square().sum(), (queries, scale))
                for side in (read.output, outputs)
            ]
            what = "Clause 6: attend must pass a gradient to queries and scale"
            for mine, theirs in zip(*gradients, strict=True):
                _assert_close(mine, theirs, what)

    @invariant()
    def store_equals_list(self) -> None:
        """Compare the store, and the copy or original beside it, with their lists."""
        self.num_checks += 1
        self.check(self.now, 1 + self.num_checks % self.memory_size)
        for branch in (self.now, self.other):
            if branch is not None:
                self.check(branch, self.memory_size)

    def check(self, branch: Branch, top_k: int) -> None:
        """Compare counters and one search with the list."""
        store, rows = branch
        assert store.memory_size == self.memory_size, "memory_size must be what was asked for."
        numbers = store.entry_numbers().cpu()
        for b, row in enumerate(rows):
            held = list(range(row.num_written - len(row.pairs), row.num_written))
            got = sorted(numbers[b].tolist())
            expected = [-1] * (self.memory_size - len(held)) + held
            assert got == expected, f"entry_numbers of row {b} must be {expected}, got {got}."
        got = store.num_written.tolist()
        expected = [row.num_written for row in rows]
        assert got == expected, f"num_written must be {expected}, got {got}."
        queries, found = self.search(store, len(rows), top_k)
        entries = self.entries_found(branch, found)
        scores = [_scores(queries[b], row) for b, row in enumerate(rows)]
        for b, row in enumerate(rows):
            if row.pairs:
                self.check_scores(scores[b], entries[b], found.scores[b].cpu())
        self.check_recall(scores, entries, top_k, "Clause 1: search must find the best entries")

    def check_recall(
        self, scores: list[Tensor], entries: Tensor, top_k: int, requirement: str
    ) -> None:
        """Count how many of the entries with the highest scores of each row were found."""
        hits, wanted = 0, 0
        for b, scores_HQN in enumerate(scores):
            best = scores_HQN.topk(min(top_k, scores_HQN.shape[-1])).values
            if best.numel():
                mine = scores_HQN.gather(-1, entries[b].clamp(min=0))
                mine = mine.masked_fill(entries[b] < 0, -torch.inf)
                hits += int((mine >= best[..., -1:] - 1e-5).sum().clamp(max=best.numel()))
                wanted += best.numel()
        recall = hits / wanted if wanted else 1.0
        assert recall >= self.minimum_recall, (
            f"{requirement}: with top_k={top_k} recall must be {self.minimum_recall}, got "
            f"{recall:.3f}."
        )

    def check_scores(self, scores: Tensor, entries: Tensor, found: Tensor) -> None:
        """Compare the scores a search reports for one row with those of the pairs it names."""
        valid = entries >= 0
        expected = scores.gather(-1, entries.clamp(min=0))[valid]
        # sums of a few multiples of 1/4096: exact in float32
        assert torch.equal(found[valid].float(), expected), (
            f"Clause 3: a score must be the inner product {expected.tolist()}, got "
            f"{found[valid].tolist()}."
        )
        falling = found.diff(dim=-1) <= 0
        assert falling[valid[..., 1:]].all(), "Clause 4: scores must be sorted, descending."

    def entries_found(self, branch: Branch, found: Neighbours) -> Tensor:
        """Look up which pairs a search named, after comparing them with the slots' content.

        Returns:
            Position in the list of pairs, -1 where `valid` is false: `[batch, heads, query, k]`.
        """
        store, rows = branch
        slots, valid = found.slots.cpu(), found.valid.cpu()
        gathered = [side.cpu().float().view(*slots.shape, -1) for side in store.gather(found.slots)]
        assert not any(side.requires_grad for side in gathered), (
            "Clause 6: entries keep a gradient."
        )
        numbers = store.entry_numbers().cpu()
        result = torch.full_like(slots, -1)
        for b, row in enumerate(rows):
            count = valid[b].sum(-1)
            most = min(slots.shape[-1], len(row.pairs))
            enough = (count == most) if self.exact else (count <= most)
            assert enough.all(), f"Clause 3: row {b} must have {most} valid, got {count.tolist()}."
            first = torch.arange(slots.shape[-1]) < count[..., None]
            assert torch.equal(valid[b], first), "Clause 4: valid neighbours must come first."
            if not row.pairs:
                continue
            entries = numbers[b][slots[b]] - (row.num_written - len(row.pairs))
            assert (entries[valid[b]] >= 0).all(), f"Clause 3: row {b} has an empty slot as valid."
            ranked = entries.masked_fill(~valid[b], -1)
            distinct = ranked.sort(-1).values.diff(dim=-1) != 0
            assert distinct[ranked.sort(-1).values[..., 1:] >= 0].all(), "A slot was found twice."
            queries_per_kv_head = slots.shape[1] // self.kv_heads
            for side, what in ((0, "key"), (1, "value")):
                pairs = torch.stack([pair[side] for pair in row.pairs], dim=1)
                pairs = pairs.repeat_interleave(queries_per_kv_head, dim=0)
                index = ranked.clamp(min=0).flatten(1)[..., None].expand(-1, -1, _HEAD_DIM)
                expected = pairs.gather(1, index).view(*ranked.shape, _HEAD_DIM)
                same = gathered[side][b][valid[b]] == expected[valid[b]]
                assert same.all(), f"Clause 3: row {b} has another {what} than was written."
            result[b] = ranked
        return result

    def search(self, store: MemoryStore, batch_size: int, top_k: int) -> tuple[Tensor, Neighbours]:
        """Search for random queries, with as many or twice as many heads as the store has.

        Returns:
            The queries and what was found.
        """
        heads = self.kv_heads * (1 + self.num_checks % 2)
        queries = self.draw(batch_size, heads, _NUM_QUERIES, _HEAD_DIM)
        return queries, store.search(self.on(queries), top_k)

    def extended(self, row: Row, keys: Tensor, values: Tensor, keep: Tensor) -> Row:
        """Add kept entries to the list, and drop the oldest.

        Returns:
            What the row should hold.
        """
        kept = keep.nonzero().flatten().tolist()
        pairs = (*row.pairs, *((keys[:, n], values[:, n]) for n in kept))
        return Row(row.num_written + len(kept), pairs[-self.memory_size :])

    def loaded(self) -> Branch:
        """Fill a store from the tensors kept last.

        Returns:
            The store and what it should hold.
        """
        assert self.saved is not None
        tensors, rows = self.saved
        return Branch(self.new_store(len(rows)).load_state_dict(tensors), rows)

    def new_store(self, batch_size: int) -> MemoryStore:
        """Make an empty store.

        Returns:
            The store.
        """
        store: Any = type(self).make_store(batch_size, self.kv_heads, self.memory_size, _HEAD_DIM)
        missing = [name for name in _METHODS if not hasattr(store, name)]
        assert not missing, f"The store lacks {', '.join(missing)} of MemoryStore."
        return cast("MemoryStore", store)

    def draw(self, *shape: int) -> Tensor:
        """Draw numbers that bfloat16 holds exactly.

        Returns:
            Multiples of 1/64 between -1 and 1.
        """
        return torch.randint(-64, 65, shape, generator=self.generator) / 64

    def on(self, tensor: Tensor) -> Tensor:
        """Move a tensor to where the store is.

        Returns:
            The moved tensor.
        """
        return tensor.to(self.now.store.num_written.device)


_METHODS = (
    "append", "attend", "entry_numbers", "fork", "gather", "load_state_dict", "memory_size",
    "num_written", "reset", "search", "select_rows", "state_dict", "to",
)  # fmt: skip


def _every_entry(rows: tuple[Row, ...], heads: int, top_k: int) -> Tensor:
    """Name all pairs of each row, as `entries_found` does for those that a search has found.

    Returns:
        Positions in the list of pairs, -1 behind the last: `[batch, heads, query, k]`.
    """
    places = torch.arange(top_k)
    held = [torch.where(places < len(row.pairs), places, -1) for row in rows]
    return torch.stack(held)[:, None, None].expand(-1, heads, _NUM_QUERIES, -1)


def _scores(queries_HQD: Tensor, row: Row) -> Tensor:
    if not row.pairs:
        return queries_HQD.new_zeros(*queries_HQD.shape[:2], 0)
    keys_GND = torch.stack([key for key, _ in row.pairs], dim=1)
    repeats = queries_HQD.shape[0] // keys_GND.shape[0]
    return queries_HQD @ keys_GND.repeat_interleave(repeats, dim=0).transpose(1, 2)


def _logits(queries_HQD: Tensor, scale: Tensor, row: Row, age_slope: float) -> Tensor:
    ages = torch.arange(len(row.pairs), 0, -1)
    return _scores(queries_HQD, row) * scale[:, None, None] - age_slope * ages.log()


def _attend_to_pairs(
    queries: Tensor, scale: Tensor, rows: tuple[Row, ...], entries: Tensor, age_slope: float
) -> tuple[Tensor, Tensor]:
    """Compute attention over the named pairs.

    Returns:
        Outputs and log of the denominators; zeros and `EXCLUDED` without a pair.
    """
    outputs, logsumexps = torch.zeros_like(queries), torch.full(queries.shape[:3], EXCLUDED)
    for b, row in enumerate(rows):
        if row.pairs:
            chosen = torch.zeros(*queries.shape[1:3], len(row.pairs) + 1, dtype=torch.bool)
            # entry -1 is the column behind the pairs
            chosen = chosen.scatter(2, entries[b] % (len(row.pairs) + 1), value=True)[..., :-1]
            logits = _logits(queries[b], scale, row, age_slope)
            logits = logits.masked_fill(~chosen, EXCLUDED)
            values = torch.stack([value for _, value in row.pairs], dim=1)
            values = values.repeat_interleave(queries.shape[1] // values.shape[0], dim=0)
            outputs[b] = torch.softmax(logits, dim=-1) @ values
            logsumexps[b] = torch.logsumexp(logits, dim=-1)
    return outputs, logsumexps


def _assert_refused(call: Callable[[], Any]) -> None:
    try:
        call()
    except MemoryStateError:
        return
    message = "Clause 7: a store that append was called on must raise MemoryStateError."
    raise AssertionError(message)


def _assert_close(actual: Tensor, expected: Tensor, requirement: str) -> None:
    torch.testing.assert_close(actual, expected, msg=lambda detail: f"{requirement}. {detail}")

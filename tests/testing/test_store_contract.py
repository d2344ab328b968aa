"""The contract finds the mistakes that memory stores make: a test of the test."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, settings

from byheart.errors import MemoryStateError
from byheart.memory.dense import DenseStore, Lease
from byheart.memory.store import KeyValues
from byheart.ops.search import Neighbours
from byheart.testing.store_contract import store_contract


class SharedOffset(DenseStore):
    """One cursor for all rows, as when rows are written together."""

    def append(self, keys, values, keep):
        longest = keep.any(0, keepdim=True).expand_as(keep)
        return super().append(keys, values, longest)


class OffByOneValidity(DenseStore):
    """One slot more than there are entries."""

    def search(self, queries, top_k):
        ahead = replace(self, cursor=self.cursor.advance(torch.ones_like(self.num_written)))
        return DenseStore.search(ahead, queries, top_k)


class WrongHead(DenseStore):
    """Heads swapped on the way in."""

    def append(self, keys, values, keep):
        return super().append(keys.flip(1), values.flip(1), keep)


class WrongHeadOfGroup(DenseStore):
    """Query head h reads key-value head h % kv_heads instead of h // group."""

    def search(self, queries, top_k):
        heads, kv_heads = queries.shape[1], self.keys.shape[1]
        order = torch.arange(heads).view(kv_heads, -1).T.flatten()
        return super().search(queries[:, order], top_k)


class ResetsAllRows(DenseStore):
    """A document start in one row forgets all."""

    def reset(self, row_mask):
        return super().reset(row_mask.any().expand_as(row_mask))


class ResetInPlace(DenseStore):
    """The store that reset was called on changes too."""

    def reset(self, row_mask):
        self.num_written.masked_fill_(row_mask, 0)
        return self


class KeyOfAnotherValue(DenseStore):
    """Values one slot later than their keys."""

    def append(self, keys, values, keep):
        return super().append(keys, values.roll(1, dims=2), keep)


class EvictsTheNewest(DenseStore):
    """A full memory takes nothing more."""

    def append(self, keys, values, keep):
        room = self.memory_size - self.num_written[:, None]
        return super().append(keys, values, keep & (keep.cumsum(1) <= room))


class LongWriteKeepsTheOldest(DenseStore):
    """Of a write longer than the memory the wrong end survives."""

    def append(self, keys, values, keep):
        return super().append(keys, values, keep & (keep.cumsum(1) <= self.memory_size))


class IgnoresTheMask(DenseStore):
    """Padding is written."""

    def append(self, keys, values, keep):
        return super().append(keys, values, torch.ones_like(keep))


class Unsorted(DenseStore):
    """The right entries in the wrong order."""

    def search(self, queries, top_k):
        return Neighbours(*(side.flip(-1) for side in super().search(queries, top_k)))


class FindsTheFarthest(DenseStore):
    """The sign of the inner product is lost."""

    def search(self, queries, top_k):
        found = super().search(-queries, top_k)
        return Neighbours(-found.scores.flip(-1), found.slots.flip(-1), found.valid.flip(-1))


class ForkShares(DenseStore):
    """A copy of the counters only."""

    def fork(self):
        self.require_current()
        return replace(self, _lease=Lease())


class SavesAView(DenseStore):
    """Saved tensors that change with the store."""

    def state_dict(self):
        self.require_current()
        return {"keys": self.keys, "values": self.values, "num_written": self.num_written}


class LoadForgetsTheCounter(DenseStore):
    """After loading, a wrapped ring counts from its size again."""

    def load_state_dict(self, state):
        loaded = super().load_state_dict(state)
        num_written = loaded.num_written.clamp(max=self.memory_size)
        return replace(loaded, cursor=replace(loaded.cursor, num_written=num_written))


class NeverUsedUp(DenseStore):
    """An old store goes on answering from overwritten slots."""

    def append(self, keys, values, keep):
        after = super().append(keys, values, keep)
        self._lease.has_ended = False
        return replace(after, _lease=self._lease)


class KeepsTheGradient(DenseStore):
    """Entries still hang on the graph that made them."""

    def gather(self, slots):
        found = super().gather(slots)
        return KeyValues(found.keys * torch.ones(1, requires_grad=True), found.values)


class AttendsWithoutScale(DenseStore):
    """The learned factor of the scores is left out."""

    def attend(self, queries, scale, top_k, age_slope=0.0):
        return super().attend(queries, 0 * scale + 1, top_k, age_slope)


class IgnoresTheAge(DenseStore):
    """Old entries count as much as new ones, whatever was asked for."""

    def attend(self, queries, scale, top_k, age_slope=0.0):
        return super().attend(queries, scale, top_k)


class ChoosesWithoutTheAge(DenseStore):
    """Entries are weighed by their age only after they were found without it."""

    def _search(self, queries, top_k, bias):
        found = super()._search(queries, top_k, None)
        if bias is None:
            return found
        row_ids = torch.arange(len(queries))[:, None, None, None]
        return found._replace(scores=found.scores + bias.at(row_ids, found.slots))


MUTANTS = {
    SharedOffset: "entry_numbers of row",
    OffByOneValidity: "Clause 3: row . must have",
    WrongHead: "Clause 3: row . has another key",
    WrongHeadOfGroup: "Clause 3: a score must be the inner product",
    ResetsAllRows: "entry_numbers of row",
    ResetInPlace: "entry_numbers of row",
    KeyOfAnotherValue: "Clause 3: row . has another value",
    EvictsTheNewest: "entry_numbers of row",
    LongWriteKeepsTheOldest: "entry_numbers of row",
    IgnoresTheMask: "entry_numbers of row",
    Unsorted: "Clause 4",
    FindsTheFarthest: "Clause 4: valid neighbours must come first|Clause 1",
    ForkShares: "Clause 3: row . has another key",
    SavesAView: "Clause 3: row . has another key|must have keys and values of the shape",
    LoadForgetsTheCounter: "entry_numbers of row",
    NeverUsedUp: "Clause 7",
    KeepsTheGradient: "Clause 6: entries keep a gradient",
    AttendsWithoutScale: "attend must return the",
    IgnoresTheAge: "attend must return the|Clause 8",
    ChoosesWithoutTheAge: "Clause 8",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_contract_catches(mutant):
    case = store_contract(mutant.empty)
    # a failure is not reduced here, only found, in shorter sequences than those of a user's test
    case.settings = settings(case.settings, phases=[Phase.generate], stateful_step_count=12)
    with pytest.raises((AssertionError, MemoryStateError), match=MUTANTS[mutant]):
        case("runTest").debug()


class MissesTheBest(DenseStore):
    """Approximate: finds the second best and what comes after it."""

    def search(self, queries, top_k):
        if top_k == self.memory_size:
            return super().search(queries, top_k)
        found = super().search(queries, top_k + 1)
        return Neighbours(*(side[..., 1:] for side in found))


@pytest.mark.parametrize(("minimum_recall", "passes"), [(0.0, True), (0.9, False)])
def test_contract_holds_an_approximate_store_to_its_recall(minimum_recall, passes):
    case = store_contract(MissesTheBest.empty, exact=False, minimum_recall=minimum_recall)
    case.settings = settings(case.settings, phases=[Phase.generate], max_examples=10)
    if passes:
        case("runTest").debug()
    else:
        with pytest.raises(AssertionError, match=r"recall must be 0\.9, got"):
            case("runTest").debug()


def test_contract_names_what_a_store_lacks():
    class Nothing:
        num_written = torch.zeros(1, dtype=torch.long)

    case = store_contract(lambda *shape: Nothing())
    with pytest.raises(AssertionError, match="The store lacks append, attend, entry_numbers"):
        case("runTest").debug()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact": False, "minimum_recall": 1.5}, "must be between 0 and 1, got 1.5"),
        ({"minimum_recall": 0.9}, "must be 1 for an exact store, got 0.9. Pass exact=False"),
    ],
)
def test_contract_refuses_impossible_recalls(options, message):
    with pytest.raises(ValueError, match=message):
        store_contract(DenseStore.empty, **options)


def test_contract_without_hypothesis_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match="needs the hypothesis package: pip install hypothesis"):
        store_contract(DenseStore.empty)


def test_importing_the_contract_does_not_import_hypothesis():
    program = "import sys, byheart.testing.store_contract; print('hypothesis' in sys.modules)"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, check=True).stdout.strip() == b"False"

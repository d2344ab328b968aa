"""Read with recurrent memory that has another memory inside, and compare what was read."""

from functools import partial

import torch

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def read(memory_model, ids, state=None, *, piece=None, **arguments):
    """Read in pieces of so many columns (default: a segment), each committed, and put the logits
    together."""
    piece = memory_model.memory_config.segment_length if piece is None else piece
    state, logits = memory_model.new_state(len(ids)) if state is None else state, []
    for part in ids.split(piece, dim=1):
        with torch.no_grad():
            out = memory_model(part, state=state, logits_to_keep=part.shape[1], **arguments)
        state = state.commit(out.new_entries)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), state


def assert_same_state(mine, theirs):
    for name in ("memory", "num_segments", "num_pending", "position"):
        close(getattr(mine, name), getattr(theirs, name))
    for row, count in enumerate(mine.num_pending.tolist()):
        assert torch.equal(mine.pending[row, :count], theirs.pending[row, :count])
    assert (mine.inner is None) == (theirs.inner is None)
    if mine.inner is not None:
        assert_same_inner(mine.inner, theirs.inner)


def assert_same_inner(mine, theirs):
    assert mine.pending is None
    assert torch.equal(mine.position, theirs.position)
    assert torch.equal(mine.num_cached, theirs.num_cached)
    for row, count in enumerate(mine.num_cached.tolist()):
        for layer, other in zip(mine.xl_cache, theirs.xl_cache, strict=True):
            for side, its in zip(layer, other, strict=True):
                close(side[row, :, side.shape[2] - count :], its[row, :, its.shape[2] - count :])
    for layer, store in mine.stores.items():
        other = theirs.stores[layer]
        assert torch.equal(store.entry_numbers(), other.entry_numbers())
        used = (store.entry_numbers() >= 0)[:, None, :, None]
        close(store.keys * used, other.keys * used)
        close(store.values * used, other.values * used)

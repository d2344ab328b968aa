"""What a state holds is decided when it is made: reading on takes no more memory."""

import gc
import types
from contextlib import suppress

import pytest
import torch

from byheart import KnnMemoryConfig, generate, read_tokens
from byheart.adapters.attach import attach

SEGMENT, MEMORY_SIZE, ROWS, CACHE = 7, 17, 2, 5
# more than the ring holds, in whole segments
FILLING = 4 * SEGMENT


@pytest.fixture(params=["llama", "gpt2"])
def memory_model(request, tiny_model):
    knn = KnnMemoryConfig(layers=(1,), memory_size=MEMORY_SIZE, top_k=5)
    cache = CACHE if request.param == "llama" else 0
    return attach(
        tiny_model(request.param), knn=knn, segment_length=SEGMENT, xl_cache_length=cache,
        gate_init=0.5,
    ).eval()  # fmt: skip


def tensors_of(state):
    """Return all tensors that a state keeps alive, whatever it keeps them in."""
    shared = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    seen, left, found = set(), [state], []
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, shared):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
            left.append(thing.grad_fn)
        else:
            left.extend(gc.get_referents(thing))
    return found


def bytes_of(state):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_of(state)}
    return sum(storage.nbytes() for storage in storages.values())


def bytes_alive():
    """Return the bytes of all tensors of the process."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # the exact types: isinstance wakes modules that are loaded on demand, and a compiler's
        # tensors, which other tests may have left, are subclasses with shapes and no data
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            # or wrappers of such
            with suppress(RuntimeError):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_a_state_has_the_bytes_of_its_ring_and_its_caches(memory_model):
    state, layout = memory_model.new_state(ROWS), memory_model.memory_layout
    store = state.stores[1]
    entry = 2 * layout.num_kv_heads * layout.head_dim * 4
    assert store.keys.nbytes + store.values.nbytes == ROWS * MEMORY_SIZE * entry
    caches = sum(side.nbytes for layer in state.xl_cache for side in layer)
    assert caches == ROWS * layout.xl_cache_length * layout.num_layers * entry
    # what else there is counts rows: positions and cursors
    rest = bytes_of(state) - caches - ROWS * MEMORY_SIZE * entry
    assert 0 < rest <= ROWS * 64


@pytest.mark.parametrize("is_training", [True, False])
def test_a_full_memory_does_not_grow_with_segments(is_training, memory_model, draw):
    state, sizes, alive = memory_model.new_state(ROWS), [], []
    for step in range(12):
        ids = draw(ROWS, SEGMENT, seed=step)
        with torch.set_grad_enabled(is_training):
            out = memory_model(ids, labels=ids, state=state)
        if is_training:
            out.loss.backward()
            memory_model.zero_grad(set_to_none=True)
        state = state.commit(out.new_entries)
        del out, ids
        if step * SEGMENT >= FILLING:
            sizes.append(bytes_of(state))
            # what grows, grows from the first to the last: each look takes half a second
            if step in (FILLING // SEGMENT, 8, 11):
                alive.append(bytes_alive())
    assert state.stores[1].num_written.tolist() == [12 * SEGMENT] * ROWS
    assert len(set(sizes)) == 1
    assert len(alive) == 3
    assert len(set(alive)) == 1
    # and no tensor is part of a graph
    assert all(tensor.grad_fn is None for tensor in tensors_of(state))


def test_a_full_memory_does_not_grow_with_single_tokens(memory_model, draw):
    state = read_tokens(memory_model, draw(ROWS, FILLING), memory_model.new_state(ROWS)).state
    sizes = []
    for step in range(5 * SEGMENT):
        state = read_tokens(memory_model, draw(ROWS, 1, seed=step), state).state
        sizes.append(bytes_of(state))
    # an unfinished segment grows until it is complete, and every one alike
    rounds = [sizes[start : start + SEGMENT] for start in range(0, len(sizes), SEGMENT)]
    assert all(one == rounds[0] for one in rounds)


def test_endless_generation_does_not_grow(memory_model, draw):
    state = read_tokens(memory_model, draw(ROWS, FILLING), memory_model.new_state(ROWS)).state
    sizes, last = [], draw(ROWS, 1)
    for _ in range(4):
        made = generate(memory_model, last, max_new_tokens=2 * SEGMENT, state=state)
        state, last = made.state, made.tokens[:, -1:]
        del made
        sizes.append((bytes_of(state), bytes_alive()))
    assert len(set(sizes)) == 1

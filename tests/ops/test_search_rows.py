"""Heads that are searched side by side give what they give one after the other."""

import gc
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from byheart.ops import search_rows
from byheart.ops.search import top_k_inner_product

BATCH, HEADS, KV_HEADS, QUERIES, ENTRIES, HEAD_DIM, TOP_K = 3, 10, 5, 7, 1013, 11, 13


@pytest.fixture(autouse=True)
def _four_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    search_rows._threads.cache_clear()
    yield
    search_rows._threads.cache_clear()
    torch.set_num_threads(before)


def search():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(BATCH, HEADS, QUERIES, HEAD_DIM, generator=generator)
    keys = torch.randn(BATCH, KV_HEADS, ENTRIES, HEAD_DIM, generator=generator)
    valid = torch.rand(BATCH, ENTRIES, generator=generator) < 0.7
    valid[1], valid[2, TOP_K - 2 :] = False, False
    bias = torch.randn(BATCH, ENTRIES, generator=generator)
    return top_k_inner_product(queries, keys, valid, TOP_K, bias=bias, max_bytes=1)


def one_after_the_other():
    torch.set_num_threads(1)
    found = search()
    torch.set_num_threads(4)
    return found


@pytest.fixture
def names(monkeypatch):
    """Collect the threads that search heads."""
    found, search_head = [], search_rows.search_head

    def spy(*arguments):
        found.append((threading.current_thread().name, torch.get_num_threads()))
        return search_head(*arguments)

    monkeypatch.setattr(search_rows, "search_head", spy)
    return found


def test_threads_find_what_one_finds(names):
    found = search()
    # a row without entries has nothing to search
    assert len(names) == 2 * KV_HEADS
    assert all(name.startswith("byheart-search") and cores == 1 for name, cores in names)
    names.clear()
    for one, other in zip(found, one_after_the_other(), strict=True):
        assert torch.equal(one, other)
    assert names == [(threading.current_thread().name, 1)] * 2 * KV_HEADS


def test_cores_that_are_left_are_shared(names, monkeypatch):
    monkeypatch.setattr(search_rows, "_MOST_THREADS", 2)
    search()
    assert {cores for _, cores in names} == {2}


def test_few_heads_have_all_cores_one_after_the_other(names):
    queries, keys = torch.randn(1, 2, 3, HEAD_DIM), torch.randn(1, 2, 101, HEAD_DIM)
    top_k_inner_product(queries, keys, torch.ones(1, 101, dtype=torch.bool), 3, max_bytes=1)
    assert names == [(threading.current_thread().name, 4)] * 2


def test_threads_for_numbers_of_cores_that_are_no_longer_used_end():
    for cores in (4, 3, 2, 4, 2):
        torch.set_num_threads(cores)
        search()
    gc.collect()
    for _ in range(1000):
        names = [thread.name for thread in threading.enumerate()]
        if sum(name.startswith("byheart-search") for name in names) == 2:
            return
        time.sleep(0.01)
    raise AssertionError(names)


def test_threads_that_begin_later_have_all_cores():
    search()
    cores = []
    later = threading.Thread(target=lambda: cores.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert torch.get_num_threads() == 4
    assert cores == [4]


def test_threads_serve_searches_without_gradients_of_any_kind():
    expected = one_after_the_other()
    with torch.inference_mode():
        found = search()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(search().scores, expected.scores)


def test_an_error_of_one_head_is_an_error_of_the_search(monkeypatch):
    def failing(*_):
        msg = "no memory left"
        raise MemoryError(msg)

    monkeypatch.setattr(search_rows, "search_head", failing)
    with pytest.raises(MemoryError, match="no memory left"):
        search()


SCRIPT = """
import os, signal, threading, torch
from byheart.ops.search import top_k_inner_product

torch.set_num_threads(2)
queries, keys = torch.randn(1, 2, 3, 5), torch.randn(1, 2, 101, 5)

def search():
    valid = torch.ones(1, 101, dtype=torch.bool)
    return top_k_inner_product(queries, keys, valid, 3, max_bytes=1).scores

expected = search()
"""

FORK = """
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(search(), expected) else 1)
print(os.waitpid(child, 0)[1] == 0)
"""

LATE = """
def late():
    threading.main_thread().join()
    print(torch.equal(search(), expected))

threading.Thread(target=late).start()
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(FORK, marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")),
        LATE,
    ],
    ids=["in a forked process", "after the main thread has ended"],
)
def test_search_works(script):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT + script]
    ended = subprocess.run(command, timeout=120, check=True, capture_output=True, text=True)
    assert ended.stdout == "True\n"

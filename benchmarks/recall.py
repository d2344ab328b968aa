"""Recall and time of the approximate searches: `python -m benchmarks.recall --out FILE`.

Recall is the share of the exact `top_k` nearest entries that a search finds; an entry as near as
the last of them counts. It depends on the keys, so there are four kinds:

- `decoder`, `decoder, not normalised`: queries and keys of the last layer of a small byte-level
  decoder, trained for a few hundred steps on Python's standard library and then run over the last
  part of it; with queries and keys scaled to length 1, and without
- `trigrams`: hashed byte trigrams of the same text, the last three with falling weight, length 1
- `random`: normally distributed, length 1: no structure at all, the hardest case

Searched are the entries before the queries, in one row. Times are the best of three, of one thread
unless OMP_NUM_THREADS says more.
"""

import argparse
import platform
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.hooks import RemovableHandle

from benchmarks.harness import machine_info, write_json
from byheart.memory.dense import DenseStore
from byheart.memory.faiss_store import FaissStore
from byheart.memory.store import MemoryStore
from byheart.models.config import DecoderConfig
from byheart.models.decoder import Block, Decoder
from byheart.ops.bucket_search import strided_bucket_top_k
from byheart.ops.norms import unit_length
from byheart.ops.search import Neighbours

SEGMENT, ROWS = 256, 8
NUM_QUERIES = 512


class QueriesAndKeys(NamedTuple):
    queries: Tensor
    """`[1, heads, NUM_QUERIES, head_dim]`"""
    keys: Tensor
    """`[1, heads, entries, head_dim]`, of the tokens before the queries."""


def standard_library() -> Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def trained_decoder(text: Tensor, steps: int, *, normalize_qk: bool) -> Decoder:
    decoder = Decoder(
        DecoderConfig(
            vocab_size=256,
            num_layers=3,
            embed_dim=128,
            num_heads=4,
            head_dim=32,
            hidden_dim=256,
            segment_length=SEGMENT,
            xl_cache_length=SEGMENT,
            normalize_qk=normalize_qk,
        )
    )
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    state = decoder.new_state(ROWS)
    stream = text[: len(text) // ROWS * ROWS].view(ROWS, -1)
    for step in range(steps):
        start = step * SEGMENT % (stream.shape[1] - SEGMENT)
        inputs, targets = (stream[:, start + shift :][:, :SEGMENT] for shift in (0, 1))
        out = decoder(inputs, state=state, targets=targets)
        assert out.loss is not None
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        state = state.commit(out.new_entries)
    print(f"  decoder with loss {out.loss.item():.2f} nats per byte")
    return decoder.eval()


@torch.no_grad()
def decoder_keys(decoder: Decoder, text: Tensor) -> QueriesAndKeys:
    block = decoder.blocks[-1]
    assert isinstance(block, Block)
    attention = block.attention
    seen: dict[str, list[Tensor]] = {"queries": [], "keys": []}

    def record(name: str) -> RemovableHandle:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            heads = output.view(*output.shape[:2], attention.num_heads, -1).transpose(1, 2)
            seen[name].append(unit_length(heads) if attention.normalize_qk else heads)

        return attention.get_submodule(name).register_forward_hook(hook)

    hooks = [record(name) for name in seen]
    state = decoder.new_state(1)
    for start in range(0, len(text), SEGMENT):
        segment = text[None, start : start + SEGMENT]
        out = decoder(segment, state=state, targets=segment)
        state = state.commit(out.new_entries)
    for hook in hooks:
        hook.remove()
    queries, keys = (torch.cat(parts, dim=2) for parts in seen.values())
    return QueriesAndKeys(queries[:, :, -NUM_QUERIES:], keys[:, :, :-NUM_QUERIES])


def trigram_keys(text: Tensor, heads: int = 2, head_dim: int = 64) -> QueriesAndKeys:
    table = torch.randn(2**16, heads, head_dim)
    trigrams = text + 257 * text.roll(1) + 65_539 * text.roll(2)
    vectors = table[trigrams * 2_654_435_761 % 2**16]
    vectors = vectors + 0.7 * vectors.roll(1, 0) + 0.5 * vectors.roll(2, 0)
    vectors = normalize(vectors, dim=-1).transpose(0, 1)[None]
    return QueriesAndKeys(vectors[:, :, -NUM_QUERIES:], vectors[:, :, :-NUM_QUERIES])


def random_keys(entries: int, heads: int = 2, head_dim: int = 64) -> QueriesAndKeys:
    queries = normalize(torch.randn(1, heads, NUM_QUERIES, head_dim), dim=-1)
    return QueriesAndKeys(queries, normalize(torch.randn(1, heads, entries, head_dim), dim=-1))


def share_found(found: Neighbours, exact: Neighbours) -> list[float]:
    """Return the recall of each head."""
    top_k = exact.scores.shape[-1]
    # rounding: the searches sum in different orders
    threshold = exact.scores[..., -1:] - 1e-5 * exact.scores[..., :1].abs()
    hits = ((found.scores >= threshold) & found.valid).sum(-1).clamp(max=top_k)
    return [round(share, 4) for share in (hits / top_k).mean((0, 2)).tolist()]


def filled(store: MemoryStore, keys: Tensor) -> tuple[MemoryStore, float]:
    began = time.perf_counter()
    for start in range(0, keys.shape[2], SEGMENT):
        part = keys[:, :, start : start + SEGMENT]
        store = store.append(part, part, torch.ones(1, part.shape[2], dtype=torch.bool))
    return store, time.perf_counter() - began


def seconds(store: MemoryStore, queries: Tensor, top_k: int) -> float:
    def once() -> float:
        began = time.perf_counter()
        store.search(queries, top_k)
        return time.perf_counter() - began

    return min(once() for _ in range(3))


def measure(name: str, data: QueriesAndKeys, top_k: int) -> list[dict[str, object]]:
    queries, keys = data
    _, heads, entries, head_dim = keys.shape
    shape = (1, heads, entries, head_dim)
    dense, _ = filled(DenseStore.empty(*shape), keys)
    exact = dense.search(queries, top_k)
    about = {"keys": name, "entries": entries, "heads": heads, "head_dim": head_dim}
    results = []
    for kind, empty in (("exact", DenseStore.empty), ("faiss", FaissStore.empty)):
        store, fill_seconds = filled(empty(*shape), keys)
        recalls = share_found(store.search(queries, top_k), exact)
        results.append(
            {
                **about,
                "search": kind,
                "recall": sum(recalls) / heads,
                "recall_by_head": recalls,
                "fill_seconds": round(fill_seconds, 3),
                "search_512_queries_seconds": round(seconds(store, queries, top_k), 4),
                "search_1_query_seconds": round(seconds(store, queries[:, :, :1], top_k), 5),
            }
        )
    valid = torch.ones(1, entries, dtype=torch.bool)
    for num_buckets in (top_k, 2 * top_k, 4 * top_k):
        recalls = share_found(strided_bucket_top_k(queries, keys, valid, num_buckets), exact)
        results.append(
            {
                **about,
                "search": f"strided buckets, {num_buckets}",
                "recall": sum(recalls) / heads,
                "recall_by_head": recalls,
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recall", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--entries", type=int, default=65_536, help="entries of the memory")
    parser.add_argument("--top-k", type=int, default=32, help="neighbours per query")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the decoder")
    arguments = parser.parse_args()
    machine = machine_info(["faiss-cpu"])
    torch.manual_seed(0)
    text = standard_library()
    read = text[-arguments.entries - NUM_QUERIES :]
    results = []
    for name in ("decoder", "decoder, not normalised", "trigrams", "random"):
        if name.startswith("decoder"):
            decoder = trained_decoder(
                text[: -len(read)], arguments.steps, normalize_qk=name == "decoder"
            )
            data = decoder_keys(decoder, read)
        elif name == "trigrams":
            data = trigram_keys(read)
        else:
            data = random_keys(arguments.entries)
        for result in measure(name, data, arguments.top_k):
            print(f"{name:24} {result['search']:22} recall {result['recall']:.3f}")
            results.append(result)
    report = {
        "top_k": arguments.top_k,
        "training_steps": arguments.steps,
        "text": f"Python {platform.python_version()} standard library, {len(text)} bytes",
        "machine": machine,
        "results": results,
    }
    write_json(arguments.out, report)


if __name__ == "__main__":
    main()

"""Up to which size is a memory read whole faster than it is searched?

    python -m benchmarks.crossover --out benchmarks/results/crossover.json [--quick]
    python -m benchmarks.crossover --out benchmarks/results/crossover-gpu.json --device cuda

A memory of `top_k` slots is read whole (`byheart.ops.whole`): attention over all entries, no search
and no gathered copies. A larger one is searched for its best 32. Both read the same full memory, of
random directions, forward and backward to queries and scale: 4 rows, 8 heads, 512 queries of 64
numbers. They compute different things; this says what each costs.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import normalize

from benchmarks.harness import machine_info, time_pairs, write_json
from byheart.memory.dense import DenseStore
from byheart.memory.ring import RingCursor

ROWS, HEADS, QUERIES, HEAD_DIM, TOP_K = 4, 8, 512, 64, 32
SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


def full_store(size: int, device: torch.device) -> DenseStore:
    shape = (ROWS, HEADS, size, HEAD_DIM)
    written = torch.full((ROWS,), size, device=device)
    cursor = RingCursor(memory_size=size, num_written=written)
    keys = normalize(torch.randn(shape, device=device), dim=-1)
    return DenseStore(keys=keys, values=torch.randn(shape, device=device), cursor=cursor)


def reader(store: DenseStore, top_k: int) -> Callable[[], None]:
    device = store.keys.device
    queries = normalize(torch.randn(ROWS, HEADS, QUERIES, HEAD_DIM, device=device), dim=-1)
    queries.requires_grad_()
    scale = torch.full((HEADS,), 10.0, requires_grad=True, device=device)

    def run() -> None:
        queries.grad = scale.grad = None
        read = store.attend(queries, scale, top_k)
        (read.output.sum() + read.logsumexp.sum()).backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="three sizes, few rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    info, results = machine_info(), []
    for size in (128, 512, 2048) if arguments.quick else SIZES:
        store = full_store(size, arguments.device)
        contenders = {"whole": reader(store, size), "searched": reader(store, TOP_K)}
        timings = time_pairs(contenders, 3 if arguments.quick else 7)
        seconds = {name: timing.median for name, timing in timings.items()}
        results.append({"entries": size, "seconds": seconds})
        ratio = seconds["whole"] / seconds["searched"]
        print(f"{size:6} entries: whole {seconds['whole']:.4f} s, x{ratio:.2f} of top-{TOP_K}")
    if arguments.out is not None:
        shape = {"rows": ROWS, "heads": HEADS, "queries": QUERIES, "head_dim": HEAD_DIM}
        content = {
            "machine": info,
            "shape": {**shape, "top_k": TOP_K, "device": str(arguments.device)},
            "results": results,
        }
        write_json(arguments.out, content)


if __name__ == "__main__":
    main()

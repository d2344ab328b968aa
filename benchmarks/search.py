"""How close exact search comes to the bare matrix product, and how it compares.

    python -m benchmarks.search --out benchmarks/results/search.json [--quick]

The floor is the product alone: every inner product computed into one reused buffer, nothing
selected; in float32 with queries or keys first, whichever is faster, and in bfloat16 only where a
processor has it. Contenders take turns, so ratios come from one run; each result is checked against
`torch.matmul` + `topk`, score by score. The largest memories have one row, and of the heads two at
1,048,576 entries, so that keys and scores fit into main memory. faiss' approximate indexes are
built for one row and two heads of random keys and of clusters, with the time to build them and the
recall measured. With a GPU everything but faiss runs there, unless told otherwise.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import machine_info, time_pairs, write_json
from byheart.ops.processor import multiplies_bfloat16
from byheart.ops.search import top_k_inner_product

HEADS, QUERIES, HEAD_DIM, TOP_K = 8, 512, 64, 32

# float32 sums of the same 64 products in another order
TOLERANCE = 1e-5


def make_keys(
    kind: str, rows: int, entries: int, generator: torch.Generator, heads: int = HEADS
) -> Tensor:
    """Return unit keys: independent, or as text makes them."""
    shape = (rows, heads, entries, HEAD_DIM)
    keys = normalize(torch.randn(shape, generator=generator), dim=-1)
    if kind == "random":
        return keys
    prototypes = normalize(torch.randn(2000, HEAD_DIM, generator=generator), dim=-1)
    drawn = prototypes[torch.randint(2000, shape[:3], generator=generator)]
    if kind == "duplicates":
        return drawn
    if kind == "hot":
        # a quarter of the memory is one entry, up to noise
        hot = keys[:, :, :1] + 0.001 * torch.randn(
            rows, heads, entries // 4, HEAD_DIM, generator=generator
        )
        keys[:, :, : entries // 4] = normalize(hot, dim=-1)
        return keys
    keys = normalize(drawn + 0.02 * torch.randn(shape, generator=generator), dim=-1)
    if kind == "sorted":
        order = (keys @ prototypes[0]).argsort(dim=-1)
        keys = keys.gather(2, order.unsqueeze(3).expand_as(keys))
    return keys


def product(queries: Tensor, keys: Tensor, keys_first: bool = False) -> Callable[[], None]:
    """Return the bare product: every score computed, none kept.

    Its blocks were the fastest of 64 to 512 queries by 2048 to 65536 entries on 2 cores; a GPU gets
    whole heads. Which of both orders is faster depends on processor and library.
    """
    num_queries, num_entries = (512, 4096) if keys.dtype is torch.float32 else (256, 8192)
    if keys.is_cuda:
        num_queries, num_entries = queries.shape[2], keys.shape[2]
    flat = torch.empty(num_queries * num_entries, dtype=keys.dtype, device=keys.device)

    def call() -> None:
        for queries_QD, keys_ND in zip(queries.flatten(0, 1), keys.flatten(0, 1), strict=True):
            for n in range(0, len(keys_ND), num_entries):
                part_ND = keys_ND[n : n + num_entries]
                for q in range(0, len(queries_QD), num_queries):
                    part_QD = queries_QD[q : q + num_queries]
                    shape = (len(part_QD), len(part_ND))
                    if keys_first:
                        out = flat[: shape[0] * shape[1]].view(shape[::-1])
                        torch.mm(part_ND, part_QD.t(), out=out)
                    else:
                        out = flat[: shape[0] * shape[1]].view(shape)
                        torch.mm(part_QD, part_ND.t(), out=out)

    return call


def matmul_topk(queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
    """Return what one writes without thinking, head by head so that it fits into memory."""

    def call() -> Tensor:
        found = torch.empty(*queries.shape[:3], TOP_K, device=queries.device)
        for row in range(keys.shape[0]):
            for head in range(keys.shape[1]):
                scores = torch.matmul(queries[row, head], keys[row, head].t())
                found[row, head] = scores.topk(TOP_K).values
        return found

    return call


def faiss_knn(queries: Tensor, keys: Tensor) -> Callable[[], Tensor] | None:
    """Return faiss' exact search without an index, or `None` if faiss cannot run here."""
    if keys.is_cuda:
        return None
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())

    def call() -> Tensor:
        found = torch.empty(*queries.shape[:3], TOP_K)
        for row in range(keys.shape[0]):
            for head in range(keys.shape[1]):
                scores, _ = faiss.knn(
                    queries[row, head].numpy(),
                    keys[row, head].numpy(),
                    TOP_K,
                    metric=faiss.METRIC_INNER_PRODUCT,
                )
                found[row, head] = torch.from_numpy(scores)
        return found

    return call


def make_queries(kind: str, keys: Tensor, generator: torch.Generator) -> Tensor:
    """Return unit queries: independent, or near what the memory holds."""
    rows, heads, entries, _ = keys.shape
    queries = normalize(torch.randn(rows, heads, QUERIES, HEAD_DIM, generator=generator), dim=-1)
    if kind != "random":
        # text asks for what it contains
        asked = torch.randint(entries, (rows, heads, QUERIES, 1), generator=generator)
        queries = normalize(keys.gather(2, asked.expand_as(queries)) + 0.1 * queries, dim=-1)
    return queries


def measure_indexes(kind: str, entries: int) -> dict[str, Any]:
    """Build faiss' approximate indexes and measure what they cost and find."""
    try:
        import faiss
    except ImportError:
        return {}
    faiss.omp_set_num_threads(torch.get_num_threads())
    generator = torch.Generator().manual_seed(entries)
    keys = make_keys(kind, 1, entries, generator, heads=2)
    queries = make_queries(kind, keys, generator)
    expected = matmul_topk(queries, keys)()
    lists = int(4 * entries**0.5)
    results: dict[str, Any] = {"keys": kind, "entries": entries, "heads": 2}
    for name, factory in {"IVF": f"IVF{lists},Flat", "HNSW": "HNSW32"}.items():
        build = search = found = 0.0
        for head in range(2):
            start = time.perf_counter()
            index = faiss.index_factory(HEAD_DIM, factory, faiss.METRIC_INNER_PRODUCT)
            index.train(keys[0, head, :: max(1, entries // (40 * lists))].numpy())
            index.add(keys[0, head].numpy())
            build += time.perf_counter() - start
            if name == "IVF":
                index.nprobe = 32
            start = time.perf_counter()
            scores, _ = index.search(queries[0, head].numpy(), TOP_K)
            search += time.perf_counter() - start
            reached = torch.from_numpy(scores) >= expected[0, head, :, -1:] - TOLERANCE
            found += reached.float().mean().item() / 2
        results[name] = {"build_seconds": build, "search_seconds": search, "recall": found}
        print(f"{kind}, {entries}: {name} {results[name]}")
    return results


def measure(
    kind: str, shape: tuple[int, int, int], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Time all contenders at one size: rows, heads, entries; refuse to report a wrong result."""
    rows, heads, entries = shape
    generator = torch.Generator().manual_seed(entries)
    keys = make_keys(kind, rows, entries, generator, heads)
    queries = make_queries(kind, keys, generator).to(device)
    keys = keys.to(device)
    half = keys.bfloat16()
    valid = torch.ones(rows, entries, dtype=torch.bool, device=device)
    searches: dict[str, Callable[[], Tensor]] = {
        "byheart": lambda: top_k_inner_product(queries, keys, valid, TOP_K).scores,
        "byheart, float32 pass only": lambda: (
            top_k_inner_product(queries, keys, valid, TOP_K, scan_dtype=torch.float32).scores
        ),
    }
    faiss_call = faiss_knn(queries, keys)
    if faiss_call is not None:
        searches["faiss.knn"] = faiss_call
    naive = matmul_topk(queries, keys)
    expected = naive()
    for name, call in searches.items():
        check(name, call(), expected)
    halves: dict[str, Callable[[], Tensor]] = {
        "byheart, bfloat16 keys": lambda: top_k_inner_product(queries, half, valid, TOP_K).scores,
    }
    if keys.is_cuda:
        asked = queries.bfloat16()
        halves["byheart, bfloat16 both"] = lambda: (
            top_k_inner_product(asked, half, valid, TOP_K).scores
        )
        for (name, call), wide in zip(halves.items(), (queries, asked.float()), strict=True):
            check(name, call(), matmul_topk(wide, half.float())())
    products = {"product float32": product(queries, keys)}
    if not keys.is_cuda:
        products["product float32, keys first"] = product(queries, keys, keys_first=True)
    if multiplies_bfloat16(device):
        products["product bfloat16"] = product(queries.bfloat16(), half)
    contenders: dict[str, Callable[[], object]] = {
        **products,
        **searches,
        **halves,
        "matmul + topk": naive,
    }
    timings = time_pairs(contenders, repeats)
    result: dict[str, Any] = {
        "keys": kind, "rows": rows, "heads": heads, "entries": entries, "repeats": repeats
    }  # fmt: skip
    floors = {
        bits: min(timings[name].median for name in products if bits in name)
        for bits in ("float32", "bfloat16")
        if any(bits in name for name in products)
    }
    result["contenders"] = {
        name: {
            "median_seconds": round(timing.median, 5),
            "fastest_seconds": round(timing.fastest, 5),
            **{
                f"times_product_{bits}": round(timing.median / floor, 3)
                for bits, floor in floors.items()
            },
        }
        for name, timing in timings.items()
    }
    return result


def check(name: str, scores: Tensor, expected: Tensor) -> None:
    worst = (scores - expected).abs().max().item()
    if worst > TOLERANCE:
        msg = f"{name} is wrong: scores differ by {worst}"
        raise SystemExit(msg)


def report(result: dict[str, Any]) -> None:
    shape = f"{result['rows']} rows of {result['heads']} heads"
    print(f"\n{result['entries']} entries, {result['keys']} keys, {shape}")
    print(f"{'':28}{'median s':>10}{'fastest s':>11}{'x float32':>11}{'x bfloat16':>11}")
    for name, row in result["contenders"].items():
        print(
            f"{name:28}{row['median_seconds']:10.4f}{row['fastest_seconds']:11.4f}"
            f"{row['times_product_float32']:11.2f}"
            f"{row.get('times_product_bfloat16', float('nan')):11.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="one row, small memories, few repeats")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--note", help="kept with the results, for example how the run was started")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = 1 if arguments.quick else 4
    cases = [("random", 2048, 9), ("random", 8192, 7)]
    if not arguments.quick:
        cases += [("random", entries, 3) for entries in (65536, 262144, 1048576)]
        cases += [(kind, 8192, 3) for kind in ("clusters", "sorted", "duplicates", "hot")]
    results: dict[str, Any] = {
        "machine": machine_info(["faiss-cpu", "triton"]),
        "device": str(arguments.device),
        "note": arguments.note,
        "shape": {"heads": HEADS, "queries": QUERIES, "head_dim": HEAD_DIM, "top_k": TOP_K},
        "cases": [],
        "indexes": [],
    }
    for kind, entries, repeats in cases:
        # 262144 entries of one row are as many scores as 65536 of four
        heads = HEADS if entries <= 262144 else HEADS // 4
        shape = (rows if entries <= 65536 else 1, heads, entries)
        result = measure(kind, shape, repeats, arguments.device)
        report(result)
        results["cases"].append(result)
        if arguments.out is not None:
            write_json(arguments.out, results)
    with_indexes = not arguments.quick and arguments.device.type == "cpu"
    for kind in ("random", "clusters") if with_indexes else ():
        results["indexes"].append(measure_indexes(kind, 65536))
        if arguments.out is not None:
            write_json(arguments.out, results)


if __name__ == "__main__":
    main()

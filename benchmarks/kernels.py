"""What the search on a GPU is made of: each kernel, each way to group entries, and the floor.

    python -m benchmarks.kernels --out benchmarks/results/kernels.json [--quick] [--plans]

4 rows of 8 heads, 512 queries of 64 numbers, top-32; the largest memories have one row. With
`--plans` other ways to group the entries are measured, too. The floor is the larger of two: the
arithmetic at the rate of a large square product, and the bytes of the keys at the rate of a large
copy, both measured in the same run. Keys of 16 and 8 bits are multiplied as bfloat16, once; float32
keys as TF32, three times, where `product` (one call that writes all scores, as `benchmarks.search`
compares with) uses the ordinary units. Times are from events around many calls: gaps in which the
GPU waits for launches are part of them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import copy_rate, machine_info, time_on_device, write_json
from byheart.ops import search_plan
from byheart.ops.gather import gather_attend
from byheart.ops.search import Neighbours, top_k_inner_product
from byheart.ops.search_plan import Plan

HEADS, QUERIES, HEAD_DIM, TOP_K = 8, 512, 64, 32
# float32 sums of the same 64 products in another order, and what TF32 in parts leaves out
TOLERANCE = 1e-5

PLANS = (Plan(8, 16), Plan(16, 8), Plan(16, 16), Plan(32, 8))
SIZES = ((4, 8192), (4, 65_536), (1, 262_144), (1, 1_048_576))
TYPES = {
    "float32": (torch.float32, torch.float32),
    "float32 queries, bfloat16 keys": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 queries, float8 keys": (torch.bfloat16, torch.float8_e4m3fn),
}


def rates() -> dict[str, float]:
    """Measure what the device reaches: float operations of products, bytes of a copy, a second."""
    found = {"bytes": copy_rate()}
    side = 8192
    for name, dtype in {
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "TF32": torch.float32,
    }.items():
        square = torch.randn(side, side, device="cuda", dtype=dtype)
        out = torch.empty_like(square)
        torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
        seconds = time_on_device(lambda x=square, out=out: torch.mm(x, x, out=out))
        found[name] = 2 * side**3 / seconds
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def kernel_times(call: Callable[[], object], calls: int = 5) -> dict[str, float]:
    """Return the seconds that each kernel takes of one call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    rows = [(event.key, event.self_device_time_total) for event in profile.key_averages()]
    return {name: total / calls / 1e6 for name, total in rows if total > 0}


def measure(
    kind: str, rows: int, entries: int, rate: dict[str, float], *, plans: bool
) -> dict[str, Any]:
    query_dtype, key_dtype = TYPES[kind]
    keys = normalize(torch.randn(rows, HEADS, entries, HEAD_DIM, device="cuda"), dim=-1)
    queries = normalize(torch.randn(rows, HEADS, QUERIES, HEAD_DIM, device="cuda"), dim=-1)
    keys, queries = keys.to(key_dtype), queries.to(query_dtype)
    valid = torch.ones(rows, entries, dtype=torch.bool, device="cuda")

    def search() -> Neighbours:
        return top_k_inner_product(queries, keys, valid, TOP_K)

    check(search(), queries, keys)
    flops = 2 * rows * HEADS * QUERIES * entries * HEAD_DIM
    product_rate = rate["TF32"] / 3 if key_dtype is torch.float32 else rate["bfloat16"]
    result: dict[str, Any] = {
        "types": kind, "rows": rows, "entries": entries,
        "floor": max(flops / product_rate, keys.nbytes / rate["bytes"]),
    }  # fmt: skip
    if key_dtype.itemsize > 1:
        half = queries.to(key_dtype)
        scores = torch.empty(rows, HEADS, QUERIES, entries, dtype=key_dtype, device="cuda")
        result["product"] = time_on_device(
            lambda: torch.matmul(half, keys.transpose(2, 3), out=scores)
        )
        result["matmul + topk"] = time_on_device(
            lambda: torch.matmul(half, keys.transpose(2, 3), out=scores).topk(TOP_K)
        )
    result["search"] = time_on_device(search)
    result["kernels"] = kernel_times(search)
    result["plans"] = measure_plans(search) if plans else {}
    return result


def measure_plans(search: Callable[[], object]) -> dict[str, float]:
    """Time a search with other ways to group entries."""
    chosen, found = search_plan.choose_plan, {}
    try:
        for plan in PLANS:
            search_plan.choose_plan = lambda *_, plan=plan: plan
            name = f"groups of {plan.group}, {plan.groups_per_tile} a tile"
            found[name] = time_on_device(search)
    finally:
        search_plan.choose_plan = chosen
    return found


def check(found: Neighbours, queries: Tensor, keys: Tensor) -> None:
    """Refuse to report a search of one head that is not exact."""
    scores = queries[0, 0].double() @ keys[0, 0].double().T
    wanted = scores.topk(TOP_K).values
    for ours in (found.scores[0, 0], scores.gather(1, found.slots[0, 0])):
        worst = float((ours - wanted).abs().max())
        if not worst <= TOLERANCE:
            msg = f"scores differ by {worst}"
            raise SystemExit(msg)


def gather(rows: int, entries: int, dtype: torch.dtype) -> dict[str, float]:
    """Time attention over what was found, forward and backward."""
    keys, values = torch.randn(2, rows, HEADS, entries, HEAD_DIM, device="cuda").to(dtype)
    queries = normalize(torch.randn(rows, HEADS, QUERIES, HEAD_DIM, device="cuda"), dim=-1)
    valid = torch.ones(rows, entries, dtype=torch.bool, device="cuda")
    found = top_k_inner_product(queries, keys, valid, TOP_K)
    queries.requires_grad_()
    scale = torch.ones(HEADS, device="cuda", requires_grad=True)

    def forward() -> Tensor:
        return gather_attend(queries, scale, keys, values, found).output

    def both() -> None:
        forward().sum().backward()

    gathered = rows * HEADS * QUERIES * TOP_K * HEAD_DIM * keys.element_size()
    return {
        "entries": entries, "dtype": str(dtype), "bytes gathered": gathered,
        "forward": time_on_device(forward), "forward and backward": time_on_device(both),
    }  # fmt: skip


def report(row: dict[str, Any]) -> None:
    print(f"\n{row['types']}, {row['rows']} x {row['entries']}: floor {1e3 * row['floor']:.3f} ms")
    for name in ("product", "matmul + topk", "search"):
        if name in row:
            print(f"  {name:40} {1e3 * row[name]:9.3f} ms")
    for part in ("kernels", "plans"):
        for name, seconds in sorted(row[part].items(), key=lambda item: -item[1])[:7]:
            print(f"    {name[:60]:60} {1e3 * seconds:9.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="one size")
    parser.add_argument("--plans", action="store_true", help="also other ways to group entries")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rate = rates()
    print({name: f"{value / 1e12:.1f} T/s" for name, value in rate.items()})
    results: dict[str, Any] = {"machine": machine_info(["triton"]), "rates": rate, "searches": []}
    for rows, entries in SIZES[1:2] if arguments.quick else SIZES:
        for kind in TYPES:
            row = measure(kind, rows, entries, rate, plans=arguments.plans)
            report(row)
            results["searches"].append(row)
            save(arguments.out, results)
    results["gather"] = [gather(4, 65_536, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for row in results["gather"]:
        print(row)
    save(arguments.out, results)


def save(out: Path | None, results: dict[str, Any]) -> None:
    if out is not None:
        write_json(out, results)


if __name__ == "__main__":
    main()

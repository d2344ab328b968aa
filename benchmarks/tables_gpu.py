"""Sections of benchmarks/README.md about what ran on a GPU, recurrent memory apart."""

from typing import Any

from benchmarks.table import gpu_line, read, table


def step_gpu_section() -> str | None:
    result = read("step-gpu.json")
    if result is None:
        return None
    rows = [
        [
            f"{int(name.split()[1]):,}",
            f"{1e3 * row['seconds_per_step']:.1f}",
            f"{row['ratio_to_step_without_memory']:.2f}",
            f"{1e3 * row['seconds_added_by_memory']:.1f}",
        ]
        for name, row in result["results"].items()
    ]
    shape = result["shape"]
    return "\n\n".join(
        [
            "## What a kNN memory adds to a training step on a GPU",
            f'The paper\'s size: preset "{shape["preset"]}", 12 layers, width 1024, 8 heads of '
            f"128, vocabulary {int(shape['vocab']):,}; {shape['rows']} rows of 512 tokens, XL "
            "cache 512, one memory layer, exact top-32, memory full of random directions in "
            "bfloat16; autocast to bfloat16, not compiled. The paper, with approximate search of a "
            "recall of 0.9 on a TPU: x 1.25 at 8K and x 3.0 at 65K.",
            table(["entries", "ms per step (median)", "x no memory", "added by memory (ms)"], rows),
            gpu_line(result["machine"]),
        ]
    )


def kernels_section() -> str | None:
    result = read("kernels.json")
    if result is None:
        return None
    rates, machine = result["rates"], result["machine"]
    return "\n\n".join(
        [
            "## Exact search on a GPU",
            "Milliseconds for 4 rows of 8 heads, 512 queries of 64 numbers, top-32; of 262,144 "
            "entries and more for 1 row. The product is one call that writes all scores, and "
            "`matmul + topk` that call and what follows, both with queries in the precision of "
            "the keys; for float32 on ordinary units, where byheart multiplies on tensor cores, "
            "as TF32 in three products. The floor is the arithmetic or the bytes of the keys, at "
            f"the rates of a large product ({rates['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16) "
            f"and of a large copy ({rates['bytes'] / 1e12:.1f} TB/s), measured in the same run. "
            "The scores of one head were checked against a float64 product, but for float8. "
            f"Load of the {machine['cores']} cores when it began: "
            f"{machine['load_average_before']:.1f}, so the gaps in which the GPU waits for "
            "launches may be longer than they need be. At 1,048,576 entries in float32 tiles "
            "were too large, which has been changed after this run.",
            _searches(result),
            "What the time is made of, by kernel; what is missing to the whole are gaps.",
            _kernels(result),
            gpu_line(result["machine"]),
        ]
    )


def _searches(result: dict[str, Any]) -> str:
    rows = []
    for search in result["searches"]:
        product, naive = search.get("product"), search.get("matmul + topk")
        rows.append(
            [
                f"{search['types']}, {search['entries']:,}",
                # float32 is multiplied as TF32, whose rate old results do not tell
                f"{1e3 * search['floor']:.3f}" if is_floor(result, search) else "-",
                *(
                    f"{1e3 * search[name]:.3f}" if name in search else "-"
                    for name in ("product", "matmul + topk", "search")
                ),
                f"{search['search'] / product:.2f}" if product else "-",
                f"{naive / search['search']:.1f}" if naive else "-",
            ]
        )
    header = ["keys, entries", "floor", "product", "matmul + topk", "byheart", "x product"]
    return table([*header, "times faster than matmul + topk"], rows)


def is_floor(result: dict[str, Any], search: dict[str, Any]) -> bool:
    return search["types"] != "float32" or "TF32" in result["rates"]


def _kernels(result: dict[str, Any]) -> str:
    names = ("group_maxima", "coarse_maxima", "select_largest", "score_members", "order_chosen")
    rows = [
        [
            f"{search['types']}, {search['entries']:,}",
            *(f"{1e3 * search['kernels'].get(name, 0.0):.3f}" for name in names),
            f"{1e3 * sum(t for name, t in search['kernels'].items() if name not in names):.3f}",
            f"{1e3 * search['search']:.3f}",
        ]
        for search in result["searches"]
    ]
    return table(["keys, entries", *names, "others", "whole"], rows)


def plans_section() -> str | None:
    result = read("kernels-plans.json")
    if result is None:
        return None
    names = list(result["searches"][0]["plans"])
    rows = [
        [
            f"{search['types']}, {search['entries']:,}",
            *(f"{1e3 * search['plans'][name]:.3f}" for name in names),
        ]
        for search in result["searches"]
    ]
    return "\n\n".join(
        [
            "## How entries are grouped on a GPU",
            "Milliseconds of a search as above, before its selection could end early; the command "
            "has since got an option for them, `--plans`.",
            table(["keys, entries", *names], rows),
            gpu_line(result["machine"]),
        ]
    )

"""Sections of benchmarks/README.md about decoding and reading, and about approximate indexes."""

from typing import Any

from benchmarks.table import machine_line, read, table


def decode_section(name: str, on: str = "") -> str | None:
    result = read(name)
    if result is None:
        return None
    floors, shape = result["floors"], result["shape"]
    base = result["results"]["no memory"]["seconds_per_step"]
    rows = []
    for contender, row in result["results"].items():
        size = contender.removeprefix("memory of ").partition(",")[0]
        # what a step has to read: the weights, and the memory in the form in which it is read
        read_as = "float32 keys" if contender.endswith(("product", "faiss.knn")) else "8-bit codes"
        floor = floors["no memory"] + floors.get(f"{read_as} of {size}", 0.0)
        is_ours = "transformers" not in contender
        rows.append(
            [
                contender,
                f"{row['tokens_per_second']:.1f}",
                f"{1e3 * row['seconds_per_step']:.1f}",
                f"{row['seconds_per_step'] / base:.2f}",
                f"{1e3 * floor:.1f}" if is_ours else "-",
                f"{row['seconds_per_step'] / floor:.2f}" if is_ours else "-",
            ]
        )
    header = ["decoding with", "tokens/s", "ms per step", "x no memory", "floor (ms)", "x floor"]
    return "\n\n".join(
        [
            f"## Decoding with a full memory, batch {shape['batch']}{on}",
            f'Preset "{shape["preset"]}", XL cache 512, one memory layer, exact '
            f"top-{shape['top_k']}, keys of random directions. The floor is the time to read "
            "weights, XL caches, and the keys of all heads in the form in which they are read "
            f"(8-bit codes for ours), at {result['bytes_per_second'] / 1e9:.1f} GB/s, measured in "
            "the same turns. transformers attends to all tokens in all layers; "
            "memorizing-transformers-pytorch searches approximately with one key-value head.",
            table(header, rows),
            real_keys_line(result["keys"]),
            machine_line(result["machine"]),
        ]
    )


def real_keys_line(keys: dict[str, Any] | None) -> str:
    if keys is None:
        return ""
    parts = [
        f"{1e3 * times['codes']:.1f} ms by codes and {1e3 * times['float32 product']:.1f} ms by "
        f"the float32 product with {name.replace('_', ' ')}"
        for name, times in keys.items()
        if isinstance(times, dict)
    ]
    return (
        f"The memory layer alone on {keys['entries']:,} keys of a trained decoder, "
        f"{keys['heads']} heads: {'; '.join(parts)}."
    )


def read_section() -> str | None:
    result = read("read.json")
    if result is None:
        return None
    rows = [
        [
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio_to_no_memory']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['floor_seconds']:.2f}",
            f"{row['seconds'] / row['floor_seconds']:.2f}",
        ]
        for name, row in result["results"].items()
    ]
    header = ["reading with", "tokens/s", "x no memory", "seconds", "floor (s)", "x floor"]
    return "\n\n".join(
        [
            "## Reading a long document",
            "Without gradient, with the loss of every token; 6 layers, width 512, 8 heads of 64, "
            f"{result['shape']['rows']} rows in segments of {result['shape']['segment_length']} "
            "tokens, exact top-32, memories full. The floor is the float32 matrix products, "
            f"counted, at {result['flops_per_second'] / 1e9:.0f} GFLOP/s, measured in the same "
            "turns; the search of a large memory uses bfloat16 products and may be below it.",
            table(header, rows),
            machine_line(result["machine"]),
        ]
    )


def indexes_table(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{case['keys']}, {case['entries']:,}, {name}",
            f"{case[name]['build_seconds']:.2f}",
            f"{case[name]['search_seconds']:.3f}",
            f"{case[name]['recall']:.3f}",
        ]
        for case in result.get("indexes", [])
        for name in ("IVF", "HNSW")
        if name in case
    ]
    return table(["faiss index", "build (s)", "search (s)", "recall"], rows) if rows else ""

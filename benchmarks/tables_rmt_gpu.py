"""The section of benchmarks/README.md about recurrent memory on a GPU."""

from typing import Any

from benchmarks.table import gpu_line, read, table


def recurrent_gpu_section() -> str | None:
    result = read("rmt-gpu.json")
    if result is None:
        return None
    times = [
        [name, rows, f"{value:.3f}"]
        for rows, found in result["reading"].items()
        for name, value in found["milliseconds"].items()
    ]
    ratios = [
        [name, rows, f"{value:.2f}"]
        for rows, found in result["reading"].items()
        for name, value in found["ratios"].items()
    ]
    return "\n\n".join(
        [
            "## Recurrent memory on a GPU",
            "BERT base with random weights in bfloat16, windows of 512 tokens of which 499 are "
            "text and 10 memory. The backbone reads as many windows, without memory or head; as a "
            "CUDA graph it is the floor.",
            table(["reading with", "batch", "ms per window of all rows (median)"], times),
            table(["ratio", "batch", ""], ratios),
            document_line(result),
            training_table(result["training"]),
            *([result["note"]] if "note" in result else []),
            gpu_line(result["machine"]),
        ]
    )


def document_line(result: dict[str, Any]) -> str:
    plain, compiled = result["document"], result.get("document, compiled")
    parts = [spent(plain)] + ([f"compiled {spent(compiled)}"] if compiled else [])
    return (
        f"A document of {plain['tokens']:,} tokens ({plain['segments']:,} segments) at batch 1, "
        f"recording included: {'; '.join(parts)}."
    )


def spent(document: dict[str, Any]) -> str:
    peak = document["peak_mib"]
    return f"{document['seconds']:.2f} s" + (f", peak {peak:,.0f} MiB" if peak is not None else "")


def training_table(training: dict[str, Any]) -> str:
    rows = [
        [f"{name}, ms per segment", f"{ms:.1f}"] for name, ms in training["milliseconds"].items()
    ]
    rows += [
        [f"replay, peak at {row['segments']} segments (MiB)", f"{row['peak_mib']:,.0f}"]
        for row in training["peaks"]
        if row["peak_mib"] is not None
    ]
    rows += [[name, f"{value:.3f}"] for name, value in training["ratios"].items()]
    return (
        "Training GPT-2 small in bfloat16, one row, segments of 480 tokens, a loss on every "
        "token:\n\n" + table(["training with", ""], rows)
    )

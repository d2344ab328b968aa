"""Write the tables of benchmarks/README.md from the committed results.

python -m benchmarks.tables
"""

from typing import Any

from benchmarks.table import HERE, gpu_line, machine_line, read, table
from benchmarks.tables_decode import decode_section, indexes_table, read_section
from benchmarks.tables_gpu import (
    kernels_section,
    plans_section,
    step_gpu_section,
)
from benchmarks.tables_rmt_gpu import recurrent_gpu_section
from benchmarks.tables_targets import targets_section
from benchmarks.tables_tasks import (
    flops_section,
    generalization_section,
    pretrained_section,
    recipe_section,
    task_section,
)

INTRODUCTION = """# Benchmarks

One command per question; each writes JSON with its command, machine and versions. Ratios come from
one run, in which the contenders take turns. `make bench` runs the quick set; `make bench-peers`
installs the packages to compare with. The tables are written by `python -m benchmarks.tables`.
What `corpora/` in a command holds: [corpora](corpora/README.md).
"""


def step_section(name: str, on: str = "") -> str | None:
    result = read(name)
    if result is None:
        return None
    rows = [
        [
            name,
            f"{row['seconds_per_step']:.3f}",
            f"{row['ratio_to_step_without_memory']:.2f}",
            f"{row['seconds_added_by_memory']:.3f}",
            f"{row['peak_resident_mib']:,}" if "peak_resident_mib" in row else "-",
        ]
        for name, row in result["results"].items()
        if isinstance(row, dict)
    ]
    share = result["results"].get("added_by_us_over_added_by_peer")
    peer = (
        " The peer searches approximately (HNSW) with one key-value head for all query heads, so "
        "it keeps and searches an eighth of the entries."
    )
    header = ["step", "seconds (median)", "ratio", "added by memory (s)", "peak memory (MiB)"]
    return "\n\n".join(
        [
            f"## What a kNN memory adds to a training step{on}",
            "6 layers, width 512, 8 heads of 64, 4 rows of 512 tokens, one memory layer, "
            f"exact top-32, memory full.{peer if share is not None else ''}",
            table(header, rows),
            f"At 8,192 entries byheart adds {share:.2f} of what the peer adds. The paper: x 1.25 "
            "at 8K and x 3.0 at 65K on a TPU v3."
            if share is not None
            else "",
            result.get("note", ""),
            machine_line(result["machine"]),
        ]
    )


def search_section(name: str, on: str = "") -> str | None:
    result = read(name)
    if result is None:
        return None
    names = list(result["cases"][0]["contenders"])
    rows = [
        [
            f"{case['keys']}, {case['entries']:,}",
            *(
                f"{case['contenders'][name]['median_seconds']:.3f}"
                if name in case["contenders"]
                else "-"
                for name in names
            ),
        ]
        for case in result["cases"]
    ]
    shape = result["shape"]
    smaller = [
        f"; of {case['entries']:,} entries for 1 row of {case['heads']} heads"
        for case in result["cases"]
        if case["entries"] > 65_536
    ]
    note = result["machine"]["command"]
    return "\n\n".join(
        [
            f"## Exact search against the bare matrix product{on}",
            f"Seconds for 4 rows, {shape['heads']} heads, {shape['queries']} queries of "
            f"{shape['head_dim']} numbers, top-{shape['top_k']}{''.join(smaller)}. "
            "The products are the floor: all inner products into one buffer, nothing selected. "
            "Every result was checked against `matmul` + `topk`, score by score.",
            table(["keys, entries", *names], rows),
            *filter(None, [indexes_table(result)]),
            "The machine did other work at the time and the run had real-time priority: read the "
            "ratios within a row."
            if "chrt" in note
            else "",
            machine_line(result["machine"]),
        ]
    )


def recall_section() -> str | None:
    result = read("recall.json")
    if result is None:
        return None
    searches = list(dict.fromkeys(row["search"] for row in result["results"]))
    keys = list(dict.fromkeys(row["keys"] for row in result["results"]))
    found = {(row["search"], row["keys"]): row["recall"] for row in result["results"]}
    rows = [
        [search, *(f"{found[search, key]:.3f}" if (search, key) in found else "-" for key in keys)]
        for search in searches
    ]
    return "\n\n".join(
        [
            "## Recall of the approximate searches",
            f"Share of the exact top-{result['top_k']} of 65,536 entries. Keys of a decoder after "
            f"{result['training_steps']} steps on source code, byte trigrams of the same text, and "
            "random unit vectors.",
            table(["search", *keys], rows),
            f"Text: {result['text']}.",
            machine_line(result["machine"]),
        ]
    )


def compare_section(corpus: str) -> str | None:
    summary = read(f"compare-{corpus}/summary.json")
    config = read(f"compare-{corpus}/memory.config.json")
    if summary is None or config is None:
        return None
    trained_size = config["model"]["knn_memory"]["memory_size"]
    names = {"none": "no cache, no memory", "xl": "XL cache", "memory": "XL cache + memory"}
    rows = []
    for variant, content in summary["variants"].items():
        for item in content["evaluation"]["measurements"]:
            size = item["memory_size"]
            rows.append(
                [
                    names[variant] + (f" of {size:,}" if variant == "memory" else ""),
                    f"{item['perplexity']:.3f}",
                    f"{item['bits_per_byte']:.4f}",
                    *(f"{b['nats_per_token']:.4f}" for b in item["buckets"] if b["num_tokens"]),
                ]
            )
    measured = summary["variants"]["none"]["evaluation"]["measurements"][0]
    spans = [
        f"{b['start']:,}-{b['end']:,}" if b["end"] else f"{b['start']:,}-"
        for b in measured["buckets"]
        if b["num_tokens"]
    ]
    trained = summary["variants"]["none"]["training"]["num_tokens"]
    header = ["model", "perplexity", "bits per byte", *(f"loss at {span}" for span in spans)]
    return "\n\n".join(
        [
            f"## Three models with equal tokens: {corpus}",
            f"{trained:,} tokens each, seed {summary['seed']}; {measured['num_tokens']:,} "
            f"validation tokens of {measured['num_documents']} documents. Losses are nats per "
            "token by position in the document. Memory sizes other than the trained "
            f"{trained_size:,} are evaluation only.",
            table(header, rows),
            f"![training](results/compare-{corpus}/training.png)",
            summary.get("note", ""),
            machine_line({**summary["machine"], "command": summary["command"]}),
        ]
    )


def recurrent_section() -> str | None:
    result = read("rmt.json")
    if result is None:
        return None
    peaks = [
        [
            name,
            f"{row['segments']:,}",
            f"{row['peak_resident_mib']:,.0f}",
            f"{max(row['all']):,.0f}",
        ]
        for name, rows in result["peaks"].items()
        for row in rows
    ]
    times = [[name, f"{seconds * 1e3:.1f}"] for name, seconds in result["times"].items()]
    ratios = [[name, f"{value:.3f}"] for name, value in result["ratios"].items()]
    return "\n\n".join(
        [
            "## Recurrent memory: peak memory and time",
            "GPT-2 with 4 layers, width 256 and 50,257 tokens; segments of 128 tokens, 8 memory "
            "tokens, 2 rows. Training has a loss on every token. Peaks are of processes of their "
            "own, Python and torch included, after the model is built; of byheart's "
            "three are measured, and the least counts.",
            table(["process", "segments", "peak (MiB)", "largest"], peaks),
            "In turns in one process, 8 segments:",
            table(["run", "ms per segment (median)"], times),
            table(["ratio", ""], ratios),
            documents_table(result["documents"]) if "documents" in result else "",
            machine_line(result["machine"]),
            *(
                [f"The peaks are of {machine_line(result['machine_of_peaks'])}"]
                if "machine_of_peaks" in result
                else []
            ),
        ]
    )


def documents_table(documents: dict[str, Any]) -> str:
    counts, over = documents["segments"], documents["over the floor"]
    rows = [
        [name, f"{seconds:.2f}", f"{over[name]:.2f}"]
        for name, seconds in documents["seconds"].items()
    ]
    return (
        f"{len(counts)} documents of {min(counts)} to {max(counts)} segments, read side by side: "
        "a row that is done gets the next document, or waits for the others of its batch. The "
        "floor is as many segments in documents of equal length.\n\n"
        + table(["reading with", "seconds", "x floor"], rows)
    )


def crossover_section(file: str) -> str | None:
    result = read(file)
    if result is None:
        return None
    shape, machine = result["shape"], result["machine"]
    rows = [
        [
            f"{row['entries']:,}",
            *(f"{row['seconds'][name] * 1e3:.1f}" for name in ("whole", "searched")),
            f"{row['seconds']['whole'] / row['seconds']['searched']:.2f}",
        ]
        for row in result["results"]
    ]
    return "\n\n".join(
        [
            f"## Reading a memory whole, or searching it{', on a GPU' if machine['gpu'] else ''}",
            f"Milliseconds forward and backward of {shape['rows']} rows, {shape['heads']} heads, "
            f"{shape['queries']} queries of {shape['head_dim']} numbers, float32. A memory of "
            "`top_k` slots is read whole. The two compute different things: attention over all "
            f"entries, and over the best {shape['top_k']}.",
            table(["entries", "whole", f"top-{shape['top_k']}", "ratio"], rows),
            gpu_line(machine) if machine["gpu"] else machine_line(machine),
        ]
    )


def attach_section() -> str | None:
    result = read("attach.json")
    if result is None:
        return None
    rows = [
        [name, f"{row['seconds_per_step']:.2f}", f"{row['ratio_to_the_model_alone']:.2f}"]
        for name, row in result["results"].items()
    ]
    return "\n\n".join(
        [
            "## A memory attached to a Hugging Face model",
            "A training step of a model of Llama's shape, 19M parameters, 4 rows of 512 tokens; "
            "the memory in one layer, full, exact top-32. A store of 8,192 entries in float32 is "
            "128 MiB here (4 rows x 8 heads x 8,192 x 2 x 64 numbers), one of 65,536 is 1 GiB, "
            "and an XL cache of 512 in all 6 layers 48 MiB.",
            table(["step", "seconds", "x the model alone"], rows),
            machine_line(result["machine"]),
        ]
    )


def finetune_section() -> str | None:
    result = read("finetune/summary.json")
    if result is None or "closed" not in result:
        return None
    names = {
        "none": "without memory",
        "start": "with a memory from the start",
        "tuned": "the first one, a memory attached and fine-tuned",
        "further": "the first one, trained for as many steps without a memory",
        "tuned-slower": "attached, 0.3 times the rate",
        "tuned-faster": "attached, 3 times the rate",
        "tuned-gates": "attached, gates at 3 times their rate",
    }
    rows = [
        [
            name,
            f"{result['runs'][key]['training']['steps']:,}",
            f"{measured['memory_size']:,}",
            f"{measured['nats_per_token']:.4f}",
            f"{measured['buckets'][0]['nats_per_token']:.4f}",
        ]
        for key, name in names.items()
        for measured in result["runs"][key]["evaluation"]["measurements"]
    ]
    millions = result["runs"]["none"]["training"]["num_parameters"] / 1e6
    segment = result["runs"]["none"]["evaluation"]["segment_length"]
    command = result["machine"]["command"]
    shape = "Qwen3" if "--qk-norm" in command else "Llama"
    none = (read("finetune/none.config.json") or {})["pretrained"]["memory"]
    closed = result["closed"]
    return "\n\n".join(
        [
            "## A memory attached to a model pretrained without one",
            f"{millions:.1f}M parameters of the shape of {shape}, Python source, segments of "
            f"{segment} tokens, XL cache of {none['xl_cache_length']} (`benchmarks.finetune`). "
            "Nats per token of the first 16,384 of each validation document, and of its first 512. "
            "**After 4 % of the steps the attached memory has "
            f"closed {closed['share_of_the_gap_closed']:.0%} of the gap** between the models "
            "without memory and with one from the start (the paper: 85 % for a 1B model with a "
            "memory of 65K); measured from the model after as many more steps without a memory, "
            f"{closed['share_of_the_gap_closed_beyond_further']:.0%}. The other rates stand beside "
            "the result; none was chosen by it. In the first 512 tokens most of what is gained "
            "comes with more steps of any kind.",
            table(["model", "steps", "memory size", "nats per token", "first 512"], rows),
            "One seed. Each run was made by the command of the first with its own name, several "
            "side by side.",
            gpu_line(result["machine"])
            if result["machine"]["gpu"]
            else machine_line(result["machine"]),
        ]
    )


def gates_section() -> str | None:
    result = read("gates/summary.json")
    if result is None:
        return None
    rows = [
        [
            name,
            f"{way['loss_of_the_last_fourth']:.4f}",
            f"{way['nats_with_memory']:.4f}",
            f"{way['nats_without_memory']:.4f}",
        ]
        for name, way in sorted(result["ways"].items(), key=lambda w: w[1]["nats_with_memory"])
    ]
    first = read("gates/tanh-gate.config.json")
    assert first is not None
    steps, factor = (first["training"][name] for name in ("max_steps", "gate_learning_rate_factor"))
    memory, none = first["pretrained"]["memory"], result["none"]
    return "\n\n".join(
        [
            "## What an attached memory learns fastest with",
            f"{none['num_parameters'] / 1e6:.1f}M parameters, Python source, trained for "
            f"{none['steps']:,} steps without a memory (segments of {memory['segment_length']}, "
            f"XL cache of {memory['xl_cache_length']}), then fine-tuned with one for {steps} "
            "steps on the same segments (`benchmarks.gates`); each row changes one thing of `tanh "
            f"gate` (rate of the gates {factor:g} times the model's, queries without positions, "
            f"keys of length 1, age slope {memory['knn']['age_slope']:g}, last layer). Nats per "
            "token: of training over the last fourth of the steps, and of the first 8,192 tokens "
            "of 8 validation documents with 8,192 entries and with none.",
            table(["way", "training", "with memory", "without"], rows),
            machine_line(result["machine"]),
        ]
    )


AVX2 = ", on a CPU with AVX2 alone"


def render() -> str:
    sections = [
        targets_section(),
        step_section("step.json"),
        step_section("step-avx2.json", AVX2),
        step_gpu_section(),
        attach_section(),
        finetune_section(),
        gates_section(),
        decode_section("decode.json"),
        decode_section("decode-avx2.json", AVX2),
        decode_section("decode-batch.json"),
        decode_section("decode-184m.json"),
        read_section(),
        search_section("search.json"),
        search_section("search-avx2.json", AVX2),
        kernels_section(),
        plans_section(),
        crossover_section("crossover.json"),
        crossover_section("crossover-gpu.json"),
        recall_section(),
        compare_section("python"),
        compare_section("arxiv-math"),
        recurrent_section(),
        recurrent_gpu_section(),
        *(task_section(task) for task in ("memorize", "detect", "reason")),
        generalization_section("generalization-memorize", ""),
        generalization_section("generalization-memorize-gated", ", with gates"),
        flops_section(),
        pretrained_section("memorize-minilm", "GPU"),
        pretrained_section("memorize-minilm-cpu", "CPU"),
        *(recipe_section(task) for task in ("memorize", "detect", "reason")),
    ]
    text = "\n\n".join([INTRODUCTION.strip(), *(section for section in sections if section)])
    return text + "\n"


def main() -> None:
    (HERE / "README.md").write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()

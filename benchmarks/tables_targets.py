"""The first section of benchmarks/README.md: what speed aims at, and where it stands."""

from typing import Any

from benchmarks.table import read, table

Results = dict[str, Any]

# entries of the searches and steps that have an aim
SEARCHED, STEPS = (8192, 65_536, 262_144, 1_048_576), (8192, 65_536, 262_144)


def targets_section() -> str | None:
    cpus = [("AVX-512", ""), ("AVX2", "-avx2")]
    rows = [row for name, suffix in cpus for row in cpu_rows(name, suffix)]
    rows += recurrent_row() + gpu_rows()
    return "\n\n".join(
        [
            "## Aims, and where they stand",
            "Ratios of medians of one run each; commands, floors and peers are in the sections "
            "below. CPUs have 2 cores, the GPU is one H200.",
            table(["what", "aim", "measured", "what the gap is made of"], rows),
            "Shares, rates and times in the last column that no section below has are of pilots in "
            "[the log](../docs/log.md).",
            "What ran with AVX-512 is of 2026-11-26: before heads were searched side by side, and "
            "before neighbouring slabs of codes shared a call. No such CPU was at hand since.",
        ]
    )


def cpu_rows(name: str, suffix: str) -> list[list[str]]:
    search, step, decode = (read(f"{kind}{suffix}.json") for kind in ("search", "step", "decode"))
    rows = []
    if search is not None:
        found = {
            case["entries"]: case["contenders"]
            for case in search["cases"]
            if case["keys"] == "random"
        }
        rows += [
            [
                f"exact search over the float32 product, 512 queries, {name}",
                "1.3",
                by_size({n: ratio(found[n]["byheart"], product(found[n])) for n in SEARCHED}),
                SEARCH_GAPS[name],
            ],
            [
                f"best exact peer over exact search, {name}",
                "at least 1.5",
                by_size({n: ratio(peer(found[n]), found[n]["byheart"]) for n in SEARCHED}),
                "",
            ],
        ]
    if step is not None:
        times = {n: step["results"].get(f"byheart {n}") for n in STEPS}
        rows.append(
            [
                f"training step with memory over without, 19M parameters, {name}",
                "1.15, 1.5, 3",
                by_size(
                    {n: row["ratio_to_step_without_memory"] for n, row in times.items() if row}
                ),
                STEP_GAPS[name],
            ]
        )
    if decode is not None:
        row = decode["results"]["memory of 1048576"]
        floor = 1e3 * decode["floors"]["8-bit codes of 1048576"]
        rows.append(
            [
                f"decoding with 1,048,576 entries over without memory, batch 1, {name}",
                "2",
                f"{row['ratio_to_no_memory']:.2f}",
                f"{1e3 * row['seconds_added']:.1f} ms are added, of which reading the codes takes "
                f"{floor:.1f} ms at the bandwidth of a sum; {DECODE_GAPS[name]}",
            ]
        )
    return rows


SEARCH_GAPS = {
    "AVX-512": "the product of the scan is in bfloat16, a third of the float32 one; the rest is "
    "maxima of groups, selection and scoring in float32",
    "AVX2": "of the search of a head on one core, at 8,192 entries, the product takes 59 %, "
    "reading members of groups 11 %, maxima 8 %, listing and comparing 10 %; a product "
    "of 64 queries, whose scores stay in the cache, takes a fifth longer than one of 512",
}
STEP_GAPS = {
    "AVX-512": "at 262,144 entries all of the 4.7 s added are the search of 4 rows, 0.9 times the "
    "float32 product",
    "AVX2": "all of it is the search, 1.6 to 2.1 times the float32 product; a run of seven rounds "
    "on a faster hour of the machine (step without memory 2.93 s) had 1.11 and 1.70",
}
DECODE_GAPS = {
    "AVX-512": "the rest is mostly fixed work (calls, maxima, bounds), which has been cut since: "
    "with AVX2 from 41 to 15 ms",
    "AVX2": "the kernel of 8-bit weights is bound by arithmetic, 9.5 GB/s on two cores; 15 ms are "
    "maxima, bounds and selection",
}


def product(contenders: Results) -> Results:
    names = [name for name in contenders if name.startswith("product float32")]
    return min((contenders[name] for name in names), key=lambda row: row["median_seconds"])


def peer(contenders: Results) -> Results:
    names = ("faiss.knn", "matmul + topk")
    return min((contenders[name] for name in names), key=lambda row: row["median_seconds"])


def ratio(one: Results, other: Results) -> float:
    return float(one["median_seconds"] / other["median_seconds"])


def by_size(ratios: dict[int, float]) -> str:
    return ", ".join(f"{size:,}: {value:.2f}" for size, value in ratios.items())


def recurrent_row() -> list[list[str]]:
    result = read("rmt.json")
    if result is None:
        return []
    speed = 1 / result["ratios"]["time of reading over the backbone alone"]
    return [
        [
            "recurrent memory over the speed of its backbone, reading, AVX2",
            "at least 0.95",
            f"{speed:.3f}",
            "",
        ]
    ]


def gpu_rows() -> list[list[str]]:
    rows = []
    kernels, step, recurrent = (read(f"{name}.json") for name in ("kernels", "step-gpu", "rmt-gpu"))
    if kernels is not None:
        found = {s["entries"]: s for s in kernels["searches"] if s["types"] == "bfloat16"}
        rows += [
            [
                "exact search over one bfloat16 product, H200",
                "1.5",
                by_size({n: found[n]["search"] / found[n]["product"] for n in SEARCHED}),
                "at 8,192 entries selecting and scoring members (0.23 of 0.40 ms) do not shrink "
                "with the memory, and launches leave gaps",
            ],
            [
                "`matmul` + `topk` over exact search, H200",
                "at least 5",
                by_size({n: found[n]["matmul + topk"] / found[n]["search"] for n in SEARCHED}),
                "as above",
            ],
        ]
    if step is not None:
        times = {n: step["results"][f"byheart {n}"] for n in STEPS}
        rows.append(
            [
                "training step with memory over without, 184M parameters, H200",
                "1.03, 1.12, 1.4",
                by_size({n: row["ratio_to_step_without_memory"] for n, row in times.items()}),
                "",
            ]
        )
    if recurrent is not None:
        one, many = (recurrent["reading"][batch]["ratios"] for batch in ("1", "32"))
        rows += [
            [
                "recurrent memory from graphs over as Python calls it, batch 1, H200",
                "at least 3",
                f"{one['compiled, graph: speed over eager']:.2f}",
                "",
            ],
            [
                "recurrent memory over the speed of its backbone, batch 32, H200",
                "at least 0.95",
                f"{many[EAGER]:.2f} as Python calls it",
                "the host is waited for; from graphs both had an attention mask and took three "
                "times as long, which has been changed and not measured",
            ],
            [
                f"{recurrent['document, compiled']['tokens']:,} tokens, BERT base, H200",
                "5 s",
                f"{recurrent['document, compiled']['seconds']:.2f} s",
                "",
            ],
        ]
    return [
        *rows,
        [
            "decoding with 1,048,576 entries over without memory, batch 1, H200",
            "1.2",
            "not measured",
            "`python -m benchmarks.decode_gpu` is there; a first look at 65,536 entries: 1.07",
        ],
    ]


EAGER = "eager: speed over the backbone's"

"""Recurrent memory on a GPU: reading with CUDA graphs, against the backbone alone; training.

    python -m benchmarks.rmt_gpu --out benchmarks/results/rmt-gpu.json [--quick] [--device cpu]

Reading: BERT base with random weights in bfloat16 (without autocast, which would convert the
weights again in every replay), windows of 512 tokens: 499 of text, 10 of memory, 3 special ones.
The backbone reads as many windows of 512 tokens and has no memory and no head; as a CUDA graph it
is the floor. Contenders take turns; at batch 1 also with the backbone compiled in place by
`Module.compile`, for both. Then one document of 2,043,904 tokens, 4,096 segments, is read by
`read_documents`, recording included, before and after the backbone is compiled.

Training: GPT-2 small in bfloat16, segments of 480 tokens, 16 memory tokens, one row, a loss on
every token: replay and full backpropagation in turns, and the peak memory of replay by length.

On a CPU the shapes are tiny and there are no graphs: that only tries the benchmark itself.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from benchmarks.harness import machine_info, time_pairs, write_json
from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.segment_graph import SegmentGraph, capture
from byheart.models.recurrent_config import RecurrentMemoryConfig

Run = Callable[[], None]

BERT = {
    "vocab_size": 30_522, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "num_labels": 6,
}  # fmt: skip
TINY_BERT = {
    "vocab_size": 30_522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "num_labels": 6,
}  # fmt: skip
WINDOW, SEGMENT, MEMORY = 512, 499, 10
DOCUMENT_SEGMENTS = 4096
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257}
TINY_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 503}
GPT2_SEGMENT, GPT2_MEMORY = 480, 16
COMPARED_SEGMENTS = 8


def reader(device: torch.device) -> RecurrentMemory:
    torch.manual_seed(0)
    settings = BERT if device.type == "cuda" else TINY_BERT
    model = BertForSequenceClassification(BertConfig(**settings)).to(device, torch.bfloat16).eval()
    config = RecurrentMemoryConfig(
        segment_length=SEGMENT, num_memory_tokens=MEMORY, start_ids=(101,), separator_ids=(102,),
        end_ids=(102,),
    )  # fmt: skip
    return RecurrentMemory(model, config).eval()


def text(rows: int, num_tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1000, 30_000, size=(rows, num_tokens))


def backbone_eager(memory_model: RecurrentMemory, rows: int, segments: int) -> Run:
    model, device = memory_model.model.base_model, memory_model.memory.memory.device
    windows = torch.from_numpy(text(rows, segments * WINDOW)).to(device)

    @torch.no_grad()
    def run() -> None:
        for window in windows.split(WINDOW, dim=1):
            model(window)

    return run


@torch.no_grad()
def backbone_graph(memory_model: RecurrentMemory, rows: int, segments: int) -> Run:
    model, device = memory_model.model.base_model, memory_model.memory.memory.device
    windows = torch.from_numpy(text(rows, segments * WINDOW)).to(device)
    ids = windows[:, :WINDOW].clone()
    hidden = torch.zeros(rows, WINDOW, BERT["hidden_size"], dtype=torch.bfloat16, device=device)

    def step() -> None:
        hidden.copy_(model(ids)[0])

    replay = capture(step, device)

    def run() -> None:
        for window in windows.split(WINDOW, dim=1):
            ids.copy_(window)
            replay()

    return run


def ours_eager(memory_model: RecurrentMemory, rows: int, segments: int) -> Run:
    documents = list(text(rows, segments * SEGMENT))

    def run() -> None:
        reads = memory_model.read_documents(documents, rows=rows, cuda_graphs=False)
        assert len(list(reads)) == rows

    return run


def ours_graph(memory_model: RecurrentMemory, rows: int, segments: int) -> Run:
    """A graph that is recorded before: how often that is needed depends on the documents."""
    device = memory_model.memory.memory.device
    graph = SegmentGraph(memory_model, rows)
    memory = memory_model.first_memory(memory_model.new_state(rows))
    ids = torch.from_numpy(text(rows, segments * SEGMENT))

    def run() -> None:
        graph.start(memory)
        for piece in ids.split(8 * SEGMENT, dim=1):
            graph.read(piece.contiguous().pin_memory().to(device, non_blocking=True))
        graph.memory()

    return run


def time_reading(memory_model: RecurrentMemory, *, quick: bool) -> dict[str, Any]:
    """Milliseconds per window of all rows, by batch."""
    device = memory_model.memory.memory.device
    builders = {"backbone": backbone_eager, "byheart": ours_eager}
    if device.type == "cuda":
        builders |= {"backbone, graph": backbone_graph, "byheart, graph": ours_graph}
    found: dict[str, Any] = {}
    segments = 4 if device.type == "cpu" else 16 if quick else 32
    for rows in (1, 32) if device.type == "cuda" else (1, 2):
        runs = {name: build(memory_model, rows, segments) for name, build in builders.items()}
        if rows == 1 and device.type == "cuda":
            runs |= compiled_runs(rows, segments)
        timings = time_pairs(runs, 2 if quick else 5)
        times = {name: timing.median / segments for name, timing in timings.items()}
        found[str(rows)] = {
            "segments": segments,
            "milliseconds": {name: 1e3 * seconds for name, seconds in times.items()},
            "ratios": reading_ratios(times),
        }
    return found


def compiled_runs(rows: int, segments: int) -> dict[str, Run]:
    """Build both graphs anew, around a backbone that is compiled."""
    memory_model = compiled(reader(torch.device("cuda")))
    return {
        "backbone, compiled, graph": backbone_graph(memory_model, rows, segments),
        "byheart, compiled, graph": ours_graph(memory_model, rows, segments),
    }


def compiled(memory_model: RecurrentMemory) -> RecurrentMemory:
    """Compile the backbone in place, which is all that a user has to do."""
    memory_model.model.base_model.compile(dynamic=False)
    return memory_model


def reading_ratios(times: dict[str, float]) -> dict[str, float]:
    ratios = {"eager: speed over the backbone's": times["backbone"] / times["byheart"]}
    if "byheart, graph" in times:
        ours = times["byheart, graph"]
        ratios["graph: speed over eager"] = times["byheart"] / ours
        ratios["graph: speed over the backbone's"] = times["backbone"] / ours
        ratios["graph: speed over the backbone's graph"] = times["backbone, graph"] / ours
    if "byheart, compiled, graph" in times:
        ours = times["byheart, compiled, graph"]
        ratios["compiled, graph: speed over eager"] = times["byheart"] / ours
        floor = times["backbone, compiled, graph"]
        ratios["compiled, graph: speed over the backbone's"] = floor / ours
    return ratios


def read_document(memory_model: RecurrentMemory, segments: int) -> dict[str, Any]:
    """Read one long document, recording included."""
    device = memory_model.memory.memory.device
    document = text(1, segments * SEGMENT)[0]
    before = start_peak(device)
    start = time.perf_counter()
    graphs = True if device.type == "cuda" else None
    (read,) = memory_model.read_documents([document], rows=1, cuda_graphs=graphs)
    # to look at the scores is to wait for them
    assert bool(read.logits.isfinite().all())
    return {
        "segments": segments,
        "tokens": len(document),
        "seconds": time.perf_counter() - start,
        "peak_mib": peak_mib(device),
        "reserved_mib": torch.cuda.max_memory_reserved() / 2**20 if graphs else None,
        "before_mib": before,
    }


def read_compiled(memory_model: RecurrentMemory, segments: int) -> dict[str, Any]:
    """Compile the backbone, for whole segments and for the last one, and read the document."""
    compiled(memory_model)
    read_document(memory_model, 4)
    return read_document(memory_model, segments)


def start_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def peak_mib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None


def trainer(device: torch.device, *, replay: bool) -> Callable[[int], None]:
    torch.manual_seed(0)
    settings = GPT2 if device.type == "cuda" else TINY_GPT2
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(
            n_positions=WINDOW,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **settings,
            **special,
        )
    )
    config = RecurrentMemoryConfig(
        segment_length=GPT2_SEGMENT, num_memory_tokens=GPT2_MEMORY, replay=replay
    )
    memory_model = RecurrentMemory(model.to(device, torch.bfloat16), config)
    vocab_size = settings["vocab_size"]

    def run(segments: int) -> None:
        ids = torch.randint(0, vocab_size, (1, segments * GPT2_SEGMENT), device=device)
        memory_model(ids, labels=ids).loss.backward()
        memory_model.zero_grad()

    return run


def time_training(device: torch.device, *, quick: bool) -> dict[str, Any]:
    seconds = compare_training(device, quick=quick)
    replay = trainer(device, replay=True)
    counts = (4, 8) if device.type == "cpu" else (4, 64) if quick else (4, 64, 256)
    peaks = []
    for count in counts:
        start_peak(device)
        replay(count)
        peaks.append({"segments": count, "peak_mib": peak_mib(device)})
    first, last = peaks[0]["peak_mib"], peaks[-1]["peak_mib"]
    ratios = {"time of replay over full": seconds["replay"] / seconds["full"]}
    if first is not None and last is not None:
        ratios[f"peak of {counts[-1]} over {counts[0]} segments"] = last / first
    return {
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "peaks": peaks,
        "ratios": ratios,
    }


def compare_training(device: torch.device, *, quick: bool) -> dict[str, float]:
    replay, full = trainer(device, replay=True), trainer(device, replay=False)
    contenders = {
        "replay": lambda: replay(COMPARED_SEGMENTS),
        "full": lambda: full(COMPARED_SEGMENTS),
    }
    timings = time_pairs(contenders, 1 if quick else 3)
    return {name: timing.median / COMPARED_SEGMENTS for name, timing in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    device, quick = torch.device(arguments.device), arguments.quick
    memory_model = reader(device)
    segments = 24 if device.type == "cpu" else 512 if quick else DOCUMENT_SEGMENTS
    parts: dict[str, Callable[[], Any]] = {
        "machine": lambda: machine_info(["transformers"]),
        "reading": lambda: time_reading(memory_model, quick=quick),
        "document": lambda: read_document(memory_model, segments),
    }
    if device.type == "cuda":
        parts["document, compiled"] = lambda: read_compiled(memory_model, segments)
    parts["training"] = lambda: time_training(device, quick=quick)
    result: dict[str, Any] = {}
    for name, measure in parts.items():
        result[name] = measure()
        if arguments.out:
            # what follows may fail, and a GPU is not always at hand
            write_json(arguments.out, result)
    show(result)


def show(result: dict[str, Any]) -> None:
    for rows, found in result["reading"].items():
        for name, value in found["milliseconds"].items():
            print(f"{f'batch {rows}: {name}':60} {value:10.3f} ms per window")
        for name, value in found["ratios"].items():
            print(f"{f'batch {rows}: {name}':60} {value:10.3f}")
    for name in ("document", "document, compiled"):
        if name in result:
            found = result[name]
            size, seconds, peak = found["tokens"], found["seconds"], found["peak_mib"]
            print(f"{name}: {size:,} tokens: {seconds:.2f} s, {peak} MiB")
    training = result["training"]
    for name, value in training["milliseconds"].items():
        print(f"{f'training: {name}':60} {value:10.3f} ms per segment")
    for row in training["peaks"]:
        name = f"training: peak of {row['segments']} segments"
        print(f"{name:60} {row['peak_mib']} MiB")
    for name, value in training["ratios"].items():
        print(f"{f'training: {name}':60} {value:10.3f}")


if __name__ == "__main__":
    main()

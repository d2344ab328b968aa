"""Tokens per second of reading a long document without gradient, by what the model remembers.

    python -m benchmarks.read --out benchmarks/results/read.json [--quick]

The model is the preset "20m" (6 layers, width 512, 8 heads of 64) without training; 4 rows of text
in segments of 512 tokens, loss on every token, as `byheart evaluate` reads. Memories are full of
random directions and written as the text is read. Recurrent memory has 10 memory tokens and no XL
cache. The floor of a contender is its matrix products, counted, at the rate at which this machine
multiplies large float32 matrices.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import normalize

from benchmarks.harness import machine_info, time_pairs, write_json
from benchmarks.step import ROWS, SEGMENT, TOP_K, VOCAB, Segments, text_tokens
from byheart.adapters.recurrent import RecurrentMemory
from byheart.memory.dense import DenseStore
from byheart.memory.ring import RingCursor
from byheart.models.config import DecoderConfig, preset
from byheart.models.decoder import Decoder
from byheart.models.recurrent_config import RecurrentMemoryConfig

SEGMENTS = 2
"""Segments per call."""
MEMORY_TOKENS = 10

Run = Callable[[], None]


def full_store(config: DecoderConfig, size: int) -> DenseStore:
    shape = (ROWS, config.num_heads, size, config.head_dim)
    keys = torch.empty(shape)
    for part in keys.flatten(0, 1):
        normalize(torch.randn(part.shape), dim=-1, out=part)
    cursor = RingCursor(memory_size=size, num_written=torch.full((ROWS,), size))
    return DenseStore(keys=keys, values=torch.randn(shape), cursor=cursor)


def decoder_run(config: DecoderConfig, segments: Segments) -> Run:
    torch.manual_seed(0)
    decoder = Decoder(config).eval()
    state = decoder.new_state(ROWS, memory_size=None if config.knn_memory is None else 0)
    if config.knn_memory is not None:
        store = full_store(config, config.knn_memory.memory_size)
        state = replace(state, stores=dict.fromkeys(config.knn_memory.layers, store))

    @torch.no_grad()
    def run() -> None:
        nonlocal state
        for _ in range(SEGMENTS):
            inputs, targets = segments()
            state = state.commit(decoder(inputs, state=state, targets=targets).new_entries)

    return run


def recurrent_run(config: DecoderConfig, segments: Segments) -> Run:
    torch.manual_seed(0)
    recurrent = RecurrentMemoryConfig(segment_length=SEGMENT, num_memory_tokens=MEMORY_TOKENS)
    window = SEGMENT + 2 * MEMORY_TOKENS
    model = RecurrentMemory(Decoder(replace(config, segment_length=window)), recurrent).eval()
    state = model.new_state(ROWS)

    @torch.no_grad()
    def run() -> None:
        nonlocal state
        for _ in range(SEGMENTS):
            inputs, _ = segments()
            state = state.commit(model(inputs, labels=inputs, state=state).new_entries)

    return run


def flops(config: DecoderConfig, tokens: int) -> int:
    """Count the matrix products of a segment of one row, `tokens` wide."""
    width = config.num_heads * config.head_dim
    layer = 4 * config.embed_dim * width + 2 * config.embed_dim * config.hidden_dim
    weights = config.num_layers * layer + VOCAB * config.embed_dim
    # every token sees its window: as many tokens as the XL cache holds, or half of its segment
    seen = config.xl_cache_length or tokens / 2
    if config.knn_memory is not None:
        seen += config.knn_memory.memory_size / (2 * config.num_layers)
    return int(2 * tokens * (weights + 2 * config.num_layers * width * seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="without 65,536 entries, few rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    info = machine_info()
    tokens = text_tokens()
    with_cache = preset("20m", VOCAB)
    without = replace(with_cache, xl_cache_length=0)
    configs = {"no memory": without, "XL cache of 512": with_cache}
    for size in (8192,) if arguments.quick else (8192, 65_536):
        configs[f"XL cache and memory of {size}"] = preset(
            "20m", VOCAB, memory_size=size, top_k=TOP_K
        )
    runs = {name: decoder_run(config, Segments(tokens)) for name, config in configs.items()}
    runs[f"recurrent memory of {MEMORY_TOKENS}"] = recurrent_run(without, Segments(tokens))
    counted = {name: flops(config, SEGMENT) for name, config in configs.items()}
    counted[f"recurrent memory of {MEMORY_TOKENS}"] = flops(without, SEGMENT + 2 * MEMORY_TOKENS)
    # it takes its turns with the others: what slows them slows their floor
    left, right = torch.randn(2, 2048, 2048)
    contenders = {"large product": lambda: torch.mm(left, right), **runs}
    timings = time_pairs(contenders, arguments.rounds or (3 if arguments.quick else 7))
    rate = 2 * 2048**3 / timings.pop("large product").median
    base, results = timings["no memory"].median, {}
    for name, timing in timings.items():
        floor = ROWS * SEGMENTS * counted[name] / rate
        results[name] = {
            "tokens_per_second": ROWS * SEGMENT * SEGMENTS / timing.median,
            "ratio_to_no_memory": timing.median / base,
            "seconds": timing.median,
            "floor_seconds": floor,
        }
        print(
            f"{name:32} {results[name]['tokens_per_second']:9.0f} tokens/s  "
            f"x{timing.median / base:.2f} of no memory, x{timing.median / floor:.2f} of the floor"
        )
    if arguments.out is not None:
        shape = {"rows": ROWS, "segment_length": SEGMENT, "segments": SEGMENTS}
        content = {"machine": info, "shape": shape, "flops_per_second": rate}
        write_json(arguments.out, {**content, "results": results})


if __name__ == "__main__":
    main()

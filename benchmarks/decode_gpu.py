"""Tokens per second of decoding on a GPU with a full memory, step by step and from CUDA graphs.

    python -m benchmarks.decode_gpu --out benchmarks/results/decode-gpu.json [--quick]

The paper's size (preset "184m", vocabulary 32,000), weights, caches and keys in bfloat16, XL cache
512, one memory layer, exact top-32, keys of random directions; batch 1 with up to 1,048,576 entries
and batch 32 with 65,536, each in turns with decoding without memory. A step reads the tokens that
the one before has chosen, and is measured as Python calls it and compiled with CUDA graphs
(`docs/speed.md`). The floor is the time to read weights, XL caches and keys, at the rate of a large
copy. The peer is transformers' Llama of the same shape with a static cache of 65,536 tokens in all
layers, at batch 1, both ways.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import normalize

from benchmarks.harness import copy_rate, machine_info, time_pairs, write_json
from byheart.memory.dense import DenseStore
from byheart.memory.ring import RingCursor
from byheart.memory.state import MemoryState
from byheart.models.config import DecoderConfig, preset
from byheart.models.decoder import Decoder
from byheart.models.streaming import read_tokens

VOCAB, TOP_K, PROMPT, TOKENS = 32_000, 32, 576, 16
PEER_CONTEXT = 65_536
# tokens that the peer decodes at most, in all rounds
ROOM = 512
HALF, CUDA = torch.bfloat16, torch.device("cuda")

Run = Callable[[], None]


def full_store(config: DecoderConfig, batch: int, size: int) -> DenseStore:
    shape = (batch, config.num_heads, size, config.head_dim)
    keys = torch.empty(shape, dtype=HALF, device=CUDA)
    for part in keys.flatten(0, 1):
        part.copy_(normalize(torch.randn(part.shape, device=CUDA), dim=-1))
    cursor = RingCursor(
        memory_size=size, num_written=torch.full((batch,), size, device=CUDA, dtype=torch.long)
    )
    return DenseStore(keys=keys, values=torch.randn(shape, device=CUDA, dtype=HALF), cursor=cursor)


def decoding(decoder: Decoder, batch: int, store: DenseStore | None, *, graphs: bool) -> Run:
    """Build a call that decodes some tokens, and goes on where it has stopped."""
    prompt = torch.randint(VOCAB, (batch, PROMPT), device=CUDA)
    read = read_tokens(decoder, prompt, decoder.new_state(batch, memory_size=0))
    stores = {}
    if store is not None:
        stores = dict.fromkeys(decoder.config.knn_memory.layers, store)  # type: ignore[union-attr]
        if graphs:
            for side in (store.keys, store.values):
                torch._dynamo.mark_static_address(side, guard=False)
    state = replace(read.state, stores=stores)
    token = read.last_logits.argmax(-1, keepdim=True)
    forward, commit = decoder, MemoryState.commit
    if graphs:
        forward = torch.compile(decoder, mode="reduce-overhead", fullgraph=True, dynamic=False)
        commit = torch.compile(MemoryState.commit, fullgraph=True, dynamic=False)

    def run() -> None:
        nonlocal state, token
        for _ in range(TOKENS):
            torch.compiler.cudagraph_mark_step_begin()
            out = forward(token, state=state)
            state = commit(state, out.new_entries)
            token = out.logits[:, -1].argmax(-1, keepdim=True)

    return run


def our_decoder() -> Decoder:
    torch.manual_seed(0)
    config = preset("184m", VOCAB, memory_size=8192, top_k=TOP_K)
    return Decoder(config).to(CUDA, HALF).eval()


def our_runs(decoder: Decoder, batch: int, size: int) -> dict[str, Run]:
    store = full_store(decoder.config, batch, size) if size else None
    name = f"memory of {size}" if size else "no memory"
    runs = {}
    for how, graphs in (("", False), (", CUDA graphs", True)):
        # two stores on one ring: they write at most a few tokens of random text to it
        own = store and DenseStore(keys=store.keys, values=store.values, cursor=store.cursor)
        run = decoding(decoder, batch, own, graphs=graphs)
        runs[f"{name}, batch {batch}{how}"] = run
    return runs


def llama_runs() -> dict[str, Run]:
    """Decode with a full-attention model of the same shape and a cache of many tokens."""
    name = f"transformers, {PEER_CONTEXT} cached, batch 1"
    return {
        name: llama_run(graphs=False),
        f"{name}, CUDA graphs": llama_run(graphs=True),
    }


def llama_run(*, graphs: bool) -> Run:
    """Decode with a static cache, which a graph may read, and of which nothing is copied."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config = preset("184m", VOCAB)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=config.embed_dim, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, head_dim=config.head_dim,
            # three matrices instead of two
            intermediate_size=config.hidden_dim * 2 // 3, max_position_embeddings=2 * PEER_CONTEXT,
        )
    ).to(CUDA, HALF).eval()  # fmt: skip
    cache = StaticCache(config=model.config, max_cache_len=PEER_CONTEXT + ROOM)
    shape = (1, config.num_heads, PEER_CONTEXT, config.head_dim)
    for layer in range(config.num_layers):
        pair = torch.randn(2, *shape, device=CUDA, dtype=HALF)
        cache.update(pair[0], pair[1], layer)
    token = torch.zeros(1, 1, dtype=torch.long, device=CUDA)
    forward = torch.compile(model, mode="reduce-overhead", dynamic=False) if graphs else model

    def run() -> None:
        nonlocal token
        for _ in range(TOKENS):
            torch.compiler.cudagraph_mark_step_begin()
            logits = forward(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)

    return run


def floor(name: str, batch: int, rate: float) -> float:
    """Return the least seconds of a step: reading weights, XL caches and keys."""
    config = preset("184m", VOCAB)
    pairs = batch * config.num_heads * config.head_dim
    weights = config.num_layers * 4 * config.embed_dim * config.num_heads * config.head_dim
    weights += 2 * config.num_layers * config.embed_dim * config.hidden_dim
    weights += VOCAB * config.embed_dim
    local = 2 * config.num_layers * pairs * (config.xl_cache_length + PROMPT % 512)
    size = int(name.split(",")[0].split()[-1]) if name.startswith("memory of") else 0
    return HALF.itemsize * (weights + local + pairs * size) / rate


def measure(
    runs: dict[str, Run], batch: int, rounds: int, rate: float
) -> dict[str, dict[str, float | None]]:
    """Time contenders in turns, those without memory among them."""
    timings = time_pairs(runs, rounds)
    rows: dict[str, dict[str, float | None]] = {}
    for name, timing in timings.items():
        how = ", CUDA graphs" if name.endswith("CUDA graphs") else ""
        base = timings[f"no memory, batch {batch}{how}"].median
        seconds = timing.median / TOKENS
        rows[name] = {
            "seconds_per_step": seconds,
            "tokens_per_second": batch / seconds,
            "ratio_to_no_memory": timing.median / base,
            "floor_seconds": None if "transformers" in name else floor(name, batch, rate),
        }
        print(
            f"{name:50} {1e3 * seconds:8.3f} ms/step {batch / seconds:9.1f} tokens/s  "
            f"x{timing.median / base:.2f}",
            flush=True,
        )
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="batch 1, 65,536 entries")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    # every size of memory is compiled for itself
    torch._dynamo.config.recompile_limit = 64
    rate, info = copy_rate(), machine_info(["transformers", "triton"])
    results = {"machine": info, "bytes_per_second": rate, "tokens": TOKENS, "results": {}}
    decoder = our_decoder()
    cases = [(1, (65_536,))] if arguments.quick else [(1, (1_048_576, 65_536)), (32, (65_536,))]
    for batch, sizes in cases:
        base = our_runs(decoder, batch, 0)
        builders = [partial(our_runs, decoder, batch, size) for size in sizes]
        builders += [llama_runs] if batch == 1 else []
        for build in builders:
            # each with its own turns, so that what was measured is written before the next compiles
            rows = measure(base | build(), batch, arguments.rounds, rate)
            results["results"] |= rows
            if arguments.out is not None:
                write_json(arguments.out, results)


if __name__ == "__main__":
    main()

"""Tokens per second of decoding with a full memory, against decoding without one and against peers.

    python -m benchmarks.decode --trained 300 --out benchmarks/results/decode.json [--quick]
    python -m benchmarks.decode --preset 184m --out benchmarks/results/decode-184m.json
    python -m benchmarks.decode --out benchmarks/results/decode-batch.json --batch 32

The model is a preset without training (by default "20m": 6 layers, width 512, 8 heads of 64), XL
cache 512, one memory layer, top-32. Keys in memory are random directions, the hardest case: nothing
in common, so bounds discard least. With `--trained STEPS` the memory layer alone is measured as
well, on keys, queries and scales of the decoder that `benchmarks.recall` trains for so many steps.

The floor of the memory is the time to read the keys of all heads once, at the rate at which this
machine adds up a large tensor; ours reads 8-bit codes, a quarter of the bytes. The floor of the
model is the time to read its weights and XL caches.

Peers: faiss' exact search over the same ring in place of ours; the same step with the float32
product alone; transformers' Llama of the same shape with its own cache (all layers, full
attention); memorizing-transformers-pytorch (`make bench-peers`: one key-value head, approximate).
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import machine_info, time_pairs, write_json
from benchmarks.recall import NUM_QUERIES, decoder_keys, standard_library, trained_decoder
from byheart.memory.age import AgeBias
from byheart.memory.dense import DenseStore
from byheart.memory.ring import RingCursor
from byheart.memory.state import MemoryState
from byheart.models.config import preset
from byheart.models.decoder import Decoder
from byheart.models.streaming import read_tokens
from byheart.ops.search import Neighbours, top_k_inner_product
from byheart.ops.search_select import EXCLUDED

VOCAB, TOP_K, PROMPT = 257, 32, 576
SIZES = {"quick": (65_536,), "full": (65_536, 1_048_576)}
AGE_SLOPE = 0.5
PEER_CONTEXT, PEER_BYTES = 65_536, 2 << 30

Run = Callable[[], None]


class FaissStore(DenseStore):
    """The same ring, searched by faiss without an index."""

    def _search(self, queries: Tensor, top_k: int, bias: AgeBias | None) -> Neighbours:
        import faiss

        assert bias is None
        faiss.omp_set_num_threads(torch.get_num_threads())
        scores = torch.empty(*queries.shape[:3], top_k)
        slots = torch.empty(*queries.shape[:3], top_k, dtype=torch.int64)
        for row in range(queries.shape[0]):
            for head in range(queries.shape[1]):
                found = faiss.knn(
                    queries[row, head].numpy(), self.keys[row, head].numpy(), top_k,
                    metric=faiss.METRIC_INNER_PRODUCT,
                )  # fmt: skip
                scores[row, head], slots[row, head] = map(torch.from_numpy, found)
        return Neighbours(scores, slots, scores > EXCLUDED)


class ProductStore(DenseStore):
    """The same ring, searched by the float32 product, as with more queries than codes serve."""

    def _search(self, queries: Tensor, top_k: int, bias: AgeBias | None) -> Neighbours:
        dense = None if bias is None else bias.dense()
        return top_k_inner_product(queries, self.keys, self.cursor.valid(), top_k, bias=dense)


def full_store(config: Any, batch: int, size: int) -> DenseStore:
    shape = (batch, config.num_heads, size, config.head_dim)
    keys = torch.empty(shape)
    for part in keys.flatten(0, 1):
        normalize(torch.randn(part.shape), dim=-1, out=part)
    cursor = RingCursor(memory_size=size, num_written=torch.full((batch,), size))
    return DenseStore(keys=keys, values=torch.randn(shape), cursor=cursor)


def decoding(decoder: Decoder, batch: int, store: DenseStore | None, tokens: int) -> Run:
    """Build a call that decodes some tokens, inside of a segment: the ring is only read."""
    torch.manual_seed(0)
    prompt = torch.randint(VOCAB, (batch, PROMPT))
    state = decoder.new_state(batch, memory_size=0)
    read = read_tokens(decoder, prompt, state)

    def run() -> None:
        nonlocal read
        state: MemoryState = read.state
        if store is not None:
            layers = decoder.config.knn_memory.layers  # type: ignore[union-attr]
            state = replace(state, stores=dict.fromkeys(layers, store))
        for _ in range(tokens):
            read = read_tokens(decoder, read.last_logits.argmax(-1, keepdim=True), state)
            state = read.state
        read = read._replace(state=replace(state, stores={}))

    return run


def our_runs(arguments: argparse.Namespace, tokens: int) -> dict[str, Run]:
    torch.manual_seed(0)
    config = preset(arguments.preset, VOCAB, memory_size=8192, top_k=TOP_K)
    assert config.knn_memory is not None
    decoder = Decoder(config).eval()
    aged = Decoder(replace(config, knn_memory=replace(config.knn_memory, age_slope=AGE_SLOPE)))
    aged.load_state_dict(decoder.state_dict())
    runs = {"no memory": decoding(decoder, arguments.batch, None, tokens)}
    for size in SIZES["quick" if arguments.quick or arguments.batch > 1 else "full"]:
        store = full_store(config, arguments.batch, size)
        ring = {"keys": store.keys, "values": store.values, "cursor": store.cursor}
        runs[f"memory of {size}"] = decoding(decoder, arguments.batch, store, tokens)
        runs[f"memory of {size}, age_slope {AGE_SLOPE}"] = decoding(
            aged.eval(), arguments.batch, store, tokens
        )
        runs[f"memory of {size}, float32 product"] = decoding(
            decoder, arguments.batch, ProductStore(**ring), tokens
        )
        try:
            import faiss  # noqa: F401
        except ImportError:
            continue
        runs[f"memory of {size}, faiss.knn"] = decoding(
            decoder, arguments.batch, FaissStore(**ring), tokens
        )
    return runs


def token_bytes(name: str) -> int:
    """Return the bytes of one token in a cache of all layers."""
    config = preset(name, VOCAB)
    return 2 * 4 * config.num_layers * config.num_heads * config.head_dim


def llama_run(name: str, batch: int, context: int, tokens: int) -> Run:
    """Decode with a full-attention model of the same shape and a cache of so many tokens."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = preset(name, VOCAB)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=config.embed_dim, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, head_dim=config.head_dim,
            # three matrices instead of two
            intermediate_size=config.hidden_dim * 2 // 3, max_position_embeddings=2 * context,
        )
    ).eval()  # fmt: skip
    cache, shape = DynamicCache(), (batch, config.num_heads, context, config.head_dim)
    for layer in range(config.num_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    token = torch.zeros(batch, 1, dtype=torch.long)

    @torch.no_grad()
    def run() -> None:
        for _ in range(tokens):
            model(token, past_key_values=cache, use_cache=True)
        cache.crop(-tokens)

    return run


def memorizing_run(batch: int, context: int, tokens: int, folder: str) -> Run | None:
    """Decode with memorizing-transformers-pytorch, which reads without adding to its memory."""
    try:
        from memorizing_transformers_pytorch import MemorizingTransformer
    except ImportError:
        print("memorizing-transformers-pytorch is missing: make bench-peers installs it.")
        return None
    torch.manual_seed(0)
    model = MemorizingTransformer(
        num_tokens=VOCAB, dim=512, dim_head=64, depth=6, heads=8, xl_max_memories=512,
        memorizing_layers=(4,), max_knn_memories=2 * context, num_retrieved_memories=TOP_K,
        knn_memories_directory=folder,
    ).eval()  # fmt: skip
    memories = model.create_knn_memories(batch_size=batch)
    for _ in range(0, context, 8192):
        pairs = torch.randn(batch, 8192, 2, 64)
        memories[0].add(torch.cat([normalize(pairs[:, :, :1], dim=-1), pairs[:, :, 1:]], dim=2))
    with torch.no_grad():
        # its first pass makes the XL memories
        prompt = torch.randint(VOCAB, (batch, 512))
        _, xl_memories = model(prompt, knn_memories=memories, add_knn_memory=False)
    token = torch.zeros(batch, 1, dtype=torch.long)

    @torch.no_grad()
    def run() -> None:
        nonlocal xl_memories
        for _ in range(tokens):
            _, xl_memories = model(
                token, knn_memories=memories, xl_memories=xl_memories, add_knn_memory=False
            )

    return run


def floors(arguments: argparse.Namespace, rate: float) -> dict[str, float]:
    """Return the least seconds per step that reading the bytes takes."""
    config = preset(arguments.preset, VOCAB)
    weights = sum(p.numel() for p in Decoder(config).parameters())
    pairs = arguments.batch * config.num_heads * config.head_dim
    local = 2 * config.num_layers * pairs * (config.xl_cache_length + PROMPT % 512)
    result = {"no memory": 4 * (weights + local) / rate}
    for size in SIZES["full"]:
        result[f"float32 keys of {size}"] = 4 * pairs * size / rate
        result[f"8-bit codes of {size}"] = pairs * size / rate
    return result


def real_keys(steps: int, entries: int, rounds: int) -> dict[str, Any]:
    """Time the memory layer alone on keys of a trained decoder; the result is checked."""
    text = standard_library()
    read = text[-entries - NUM_QUERIES :]
    decoder = trained_decoder(text[: -len(read)], steps, normalize_qk=True)
    queries, keys = decoder_keys(decoder, read)
    size, scale = keys.shape[2], decoder.blocks[-1].attention.log_scale.detach().exp()  # type: ignore[union-attr]
    cursor = RingCursor(memory_size=size, num_written=torch.tensor([size]))
    stores = {
        "codes": DenseStore(keys=keys, values=keys, cursor=cursor),
        "float32 product": ProductStore(keys=keys, values=keys, cursor=cursor),
    }
    results: dict[str, Any] = {"entries": size, "heads": keys.shape[1]}
    for slope in (0.0, AGE_SLOPE):

        def attending(store: DenseStore, slope: float = slope) -> Callable[[], Neighbours]:
            turns = itertools.cycle(range(queries.shape[2]))

            def attend() -> Neighbours:
                turn = next(turns)
                return store.attend(queries[:, :, turn : turn + 1], scale, TOP_K, slope).found

            return attend

        calls = {name: attending(store) for name, store in stores.items()}
        found, exact = (call() for call in calls.values())
        worst = (found.scores - exact.scores).abs().max().item()
        if worst > 1e-5:
            msg = f"scores differ by {worst}"
            raise SystemExit(msg)
        timings = time_pairs(calls, rounds)
        results[f"age_slope {slope}"] = {name: t.median for name, t in timings.items()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="65,536 entries, few rounds")
    parser.add_argument("--preset", default="20m")
    parser.add_argument("--batch", type=int, default=1, help="rows; above 1 with 65,536 entries")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--trained", type=int, metavar="STEPS", help="also real keys")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    # the prompt leaves room for so many tokens in its segment
    tokens = min(8, (512 - PROMPT % 512) // (rounds + 1))
    info = machine_info(["transformers", "faiss-cpu", "memorizing-transformers-pytorch"])
    entries = SIZES["quick" if arguments.quick else "full"][-1]
    real = real_keys(arguments.trained, entries, rounds) if arguments.trained else None
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runs = our_runs(arguments, tokens)
        context = 4096 if arguments.quick else PEER_CONTEXT
        if arguments.batch == 1 and arguments.preset == "20m":
            peer = memorizing_run(arguments.batch, context, tokens, folder)
            if peer is not None:
                runs[f"memorizing-transformers-pytorch {context}"] = peer
        if arguments.batch == 1:
            while context * token_bytes(arguments.preset) > PEER_BYTES:
                context //= 2
            runs[f"transformers, {context} cached"] = llama_run(
                arguments.preset, arguments.batch, context, tokens
            )
        # it takes its turns with the others: what slows them slows their floor
        large = torch.ones(1 << 26)
        timings = time_pairs({"adding up a large tensor": large.sum, **runs}, rounds)
        rate = large.nbytes / timings.pop("adding up a large tensor").median
    report(arguments, timings, tokens, rate, {"machine": info, "rounds": rounds, "keys": real})


def report(
    arguments: argparse.Namespace,
    timings: dict[str, Any],
    tokens: int,
    rate: float,
    about: dict[str, Any],
) -> None:
    base = timings["no memory"].median
    rows = {}
    for name, timing in timings.items():
        rows[name] = {
            "seconds_per_step": timing.median / tokens,
            "tokens_per_second": arguments.batch * tokens / timing.median,
            "ratio_to_no_memory": timing.median / base,
            "seconds_added": (timing.median - base) / tokens,
        }
        print(
            f"{name:45} {1e3 * timing.median / tokens:9.2f} ms/step "
            f"{rows[name]['tokens_per_second']:8.1f} tokens/s  x{timing.median / base:.2f}"
        )
    least = floors(arguments, rate)
    print(f"memory bandwidth {rate / 1e9:.1f} GB/s; floors:")
    for name, seconds in least.items():
        print(f"{name:45} {1e3 * seconds:9.2f} ms/step")
    if about["keys"] is not None:
        print(f"keys of a trained decoder: {about['keys']}")
    if arguments.out is not None:
        shape = {"preset": arguments.preset, "batch": arguments.batch, "top_k": TOP_K}
        content = {**about, "shape": shape, "bytes_per_second": rate, "floors": least}
        write_json(arguments.out, {**content, "results": rows})


if __name__ == "__main__":
    main()

"""What a kNN memory adds to a training step, against the same step without it and against a peer.

    python -m benchmarks.step --out benchmarks/results/step.json [--quick]
    python -m benchmarks.step --out benchmarks/results/step.json --peaks    # adds peak memory
    python -m benchmarks.step --out benchmarks/results/step-gpu.json --device cuda \\
        --preset 184m --vocab 32000 --rows 16 --precision bfloat16

The model is by default the preset "20m": 6 layers, width 512, 8 heads of 64; 4 rows of 512 tokens
of text, XL cache 512, one memory layer, top-32. A step is forward, backward, clipping, AdamW and
commit, with the memory full of keys and values of text. The peer is memorizing-transformers-pytorch
at the same shape; it keeps one key-value head for all query heads, and searches an approximate HNSW
index.

On a GPU memories are full of random directions, and there is no peer, which searches on the CPU. In
`bfloat16` the model computes under autocast and its memory is kept in bfloat16.
"""

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import machine_info, time_pairs, write_json
from byheart.memory.state import MemoryState
from byheart.models.config import PRESETS, preset
from byheart.models.decoder import Decoder

ROWS, SEGMENT, VOCAB = 4, 512, 257
MEMORY_SIZES = (0, 8192, 65_536, 262_144)
PEER_ENTRIES = 8192
TOP_K = 32

DEFAULTS = {
    "device": torch.device("cpu"), "preset": "20m", "vocab": VOCAB, "rows": ROWS,
    "precision": "float32", "compiled": False, "sizes": None,
}  # fmt: skip

Step = Callable[[], None]


def text_tokens(rows: int = ROWS) -> Tensor:
    """Return one long row of bytes per batch row: the standard library's source."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = b"".join(path.read_bytes() for path in files)
    length = len(data) // rows
    return torch.tensor([list(data[row * length : (row + 1) * length]) for row in range(rows)])


class Segments:
    """Deals out the next segment of every row, with the tokens that follow."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.start = tokens, 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        if self.start + SEGMENT + 1 > self.tokens.shape[1]:
            self.start = 0
        piece = self.tokens[:, self.start : self.start + SEGMENT + 1]
        self.start += SEGMENT
        return piece[:, :-1], piece[:, 1:]


def optimize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def our_step(memory_size: int, tokens: Tensor, dtype: str, arguments: argparse.Namespace) -> Step:
    """Build a training step of byheart whose memory is full."""
    torch.manual_seed(0)
    config = preset(
        arguments.preset,
        arguments.vocab,
        memory_size=memory_size,
        top_k=TOP_K if memory_size else None,
    )
    if config.knn_memory is not None:
        config = replace(config, knn_memory=replace(config.knn_memory, dtype=dtype))
    device = arguments.device
    decoder = Decoder(config).to(device)
    # a small rate: the keys in memory stay those of nearly the same weights
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=1e-5, fused=True if device.type == "cuda" else None
    )
    segments = Segments(tokens.to(device))
    half = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bfloat16")
    with half:
        fill = _filled if device.type == "cpu" else _filled_at_random
        state = fill(decoder, segments, memory_size)
    forward, commit = decoder, MemoryState.commit
    if arguments.compiled:
        forward = torch.compile(decoder, fullgraph=True, dynamic=False)
        commit = torch.compile(MemoryState.commit, fullgraph=True, dynamic=False)

    def step() -> None:
        nonlocal state
        inputs, targets = segments()
        with half:
            out = forward(inputs, state=state, targets=targets)
        assert out.loss is not None
        optimize(decoder, optimizer, out.loss)
        state = commit(state, out.new_entries)

    return step


@torch.no_grad()
def _filled(decoder: Decoder, segments: Segments, memory_size: int) -> MemoryState:
    rows = len(segments.tokens)
    # keys and values of the memory layer do not depend on what it reads, so filling need not read
    state, unread = decoder.new_state(rows), decoder.new_state(rows, memory_size=0)
    for _ in range(max(1, memory_size // SEGMENT)):
        entries = decoder(segments()[0], state=unread).new_entries
        state, unread = state.commit(entries), unread.commit(entries)
    return state


@torch.no_grad()
def _filled_at_random(decoder: Decoder, segments: Segments, memory_size: int) -> MemoryState:
    state = _filled(decoder, segments, 0)
    full = {}
    for layer, store in state.stores.items():
        for row in store.keys:
            row.copy_(normalize(torch.randn_like(row, dtype=torch.float32), dim=-1))
        store.values.normal_()
        written = torch.full_like(store.num_written, memory_size)
        full[layer] = replace(store, cursor=replace(store.cursor, num_written=written))
    return replace(state, stores=full)


def peer_step(memory_size: int, tokens: Tensor, folder: str) -> Step:
    """Build a training step of memorizing-transformers-pytorch with as many entries."""
    from memorizing_transformers_pytorch import MemorizingTransformer

    torch.manual_seed(0)
    model = MemorizingTransformer(
        num_tokens=VOCAB, dim=512, dim_head=64, depth=6, heads=8, xl_max_memories=SEGMENT,
        memorizing_layers=(4,) if memory_size else (),
        # twice the entries: it drops everything when the number is reached
        max_knn_memories=2 * (memory_size or SEGMENT),
        num_retrieved_memories=TOP_K, knn_memories_directory=f"{folder}/{memory_size}",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    segments, memories = Segments(tokens), model.create_knn_memories(batch_size=ROWS)
    xl_memories = None

    def step(train: bool = True) -> None:
        nonlocal xl_memories
        inputs, labels = segments()
        # it wants the whole sequence as labels and the memories of the last call
        loss, xl_memories = model(
            inputs, labels=labels, knn_memories=memories, xl_memories=xl_memories
        )
        if train:
            optimize(model, optimizer, loss)

    with torch.no_grad():
        for _ in range(memory_size // SEGMENT + 1):
            step(train=False)
    return step


def contenders(arguments: argparse.Namespace, folder: str) -> dict[str, Callable[[], Step]]:
    tokens = text_tokens(arguments.rows)
    sizes = MEMORY_SIZES[:2] if arguments.quick else MEMORY_SIZES
    if arguments.sizes:
        sizes = sorted({0, *arguments.sizes})
    dtype = arguments.precision
    found: dict[str, Callable[[], Step]] = {}
    for size in sizes:
        found[f"byheart {size}"] = lambda size=size: our_step(size, tokens, dtype, arguments)
    if any(getattr(arguments, name) != value for name, value in DEFAULTS.items()):
        # the peer has the default shape
        return found
    if not arguments.quick:
        found["byheart 65536 bfloat16 store"] = lambda: our_step(
            65_536, tokens, "bfloat16", arguments
        )
    try:
        import memorizing_transformers_pytorch  # noqa: F401
    except ImportError:
        print("The peer is missing: make bench-peers installs it.", file=sys.stderr)
        return found
    for size in (0, PEER_ENTRIES):
        found[f"memorizing-transformers-pytorch {size}"] = lambda size=size: peer_step(
            size, tokens, folder
        )
    return found


def peak_memory(name: str, quick: bool) -> int:
    """Return the peak resident bytes of a process that does three steps of one contender."""
    command = [sys.executable, "-m", "benchmarks.step", "--only", name, *(["--quick"] * quick)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(output.split()[-1])


def report(timings: dict[str, float]) -> dict[str, Any]:
    base = timings["byheart 0"]
    result: dict[str, Any] = {}
    for name, seconds in timings.items():
        own_base = timings.get(f"{name.rsplit(' ', 1)[0]} 0", base)
        result[name] = {
            "seconds_per_step": seconds,
            "ratio_to_step_without_memory": seconds / own_base,
            "seconds_added_by_memory": seconds - own_base,
        }
    peer = f"memorizing-transformers-pytorch {PEER_ENTRIES}"
    if peer in result:
        ours = result[f"byheart {PEER_ENTRIES}"]["seconds_added_by_memory"]
        result["added_by_us_over_added_by_peer"] = ours / result[peer]["seconds_added_by_memory"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="8K entries only, fewer rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--peaks", action="store_true", help="measure memory, not time")
    parser.add_argument("--only", help="do three steps of one contender and print its peak memory")
    parser.add_argument("--device", type=torch.device)
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--sizes", type=int, nargs="+", help="entries, beside 0")
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--compiled", action="store_true", help="by torch.compile")
    parser.set_defaults(**DEFAULTS)
    arguments = parser.parse_args()
    if arguments.peaks and any(getattr(arguments, n) != value for n, value in DEFAULTS.items()):
        parser.error("--peaks measures the default shape only")
    with tempfile.TemporaryDirectory() as folder:
        builders = contenders(arguments, folder)
        if arguments.only:
            step = builders[arguments.only]()
            for _ in range(3):
                step()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            return
        if arguments.peaks:
            add_peaks(arguments.out, list(builders), quick=arguments.quick)
            return
        info = machine_info(["memorizing-transformers-pytorch", "faiss-cpu"])
        steps = {name: build() for name, build in builders.items()}
        rounds = arguments.rounds or (3 if arguments.quick else 7)
        timings = {name: t.median for name, t in time_pairs(steps, rounds).items()}
    result = report(timings)
    for name, row in result.items():
        if isinstance(row, dict):
            ratio = row["ratio_to_step_without_memory"]
            print(f"{name:40} {row['seconds_per_step']:7.3f} s  x{ratio:.2f}")
        else:
            print(f"{name:40} {row:7.2f}")
    if arguments.out:
        shape = {name: str(getattr(arguments, name)) for name in DEFAULTS}
        content = {"machine": info, "shape": shape, "rounds": rounds, "results": result}
        write_json(arguments.out, content)


def add_peaks(out: Path, names: list[str], *, quick: bool) -> None:
    """Add the peak memory of each contender to the results that are there."""
    content = json.loads(out.read_text(encoding="utf-8"))
    for name in names:
        content["results"][name]["peak_resident_mib"] = round(peak_memory(name, quick) / 2**20)
        print(f"{name:40} {content['results'][name]['peak_resident_mib']:7,} MiB")
        write_json(out, content)


if __name__ == "__main__":
    main()

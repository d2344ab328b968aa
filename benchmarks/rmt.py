"""What recurrent memory costs: peak memory and time against the number of segments, and peers.

    python -m benchmarks.rmt --out benchmarks/results/rmt.json [--quick] [--authors CHECKOUT]
    python -m benchmarks.rmt --out benchmarks/results/rmt.json --times    # peaks stay as they are

The model is GPT-2 with 4 layers, width 256, 4 heads and the vocabulary of 50,257; segments of 128
tokens of text, 8 memory tokens, 2 rows. Training has a loss on every token. Peak memory is that of
a process of its own while it reads or trains, so it includes Python, torch and the model, but not
what building the model takes for a moment; byheart's are the least of three processes. Peers:
recurrent-memory-transformer-pytorch (`make bench-peers`) with its memory-replay backpropagation,
the same width, depth and heads, without its extras (XL memories, several residual streams); and
the authors' wrapper around the same GPT-2, from a checkout of
github.com/booydar/recurrent-memory-transformer that `--authors` names.

Documents of many lengths: 48 of 1 to 64 segments are read 8 at a time, by `read_documents`, where
the next document takes the row of one that is done, and in batches of 8 that last as long as their
longest. The floor is the segments of all documents at the speed of a full batch.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.harness import machine_info, time_pairs, write_json
from byheart.adapters.recurrent import RecurrentMemory
from byheart.evaluation.peak_memory import peak_memory
from byheart.models.recurrent_config import RecurrentMemoryConfig

ROWS, SEGMENT, MEMORY, VOCAB = 2, 128, 8, 50_257
WIDTH, LAYERS, HEADS = 256, 4, 4
PROCESSES = 3
"""Processes of byheart's whose least peak counts: where an allocator happens to put things makes it
up to 3 % more, at any length. All are kept."""
SHORT, LONG = 4, {"byheart train, replay": 32, "byheart read": 256}
"""Segments of documents whose times are compared."""
PIECE = 16
"""Segments per call in inference: a document is given in pieces, as it would be read from disk."""

NUM_DOCUMENTS, DOCUMENT_ROWS, LONGEST = 48, 8, 64

Run = Callable[[int], None]
"""Reads or trains on a document of so many segments."""


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=256,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def text(num_segments: int) -> Tensor:
    return torch.randint(0, VOCAB, (ROWS, num_segments * SEGMENT))


def ours(*, replay: bool) -> RecurrentMemory:
    config = RecurrentMemoryConfig(segment_length=SEGMENT, num_memory_tokens=MEMORY, replay=replay)
    return RecurrentMemory(gpt2(), config)


def our_training(*, replay: bool) -> Run:
    model = ours(replay=replay)

    def run(num_segments: int) -> None:
        ids = text(num_segments)
        model(ids, labels=ids).loss.backward()
        model.zero_grad()

    return run


def our_reading() -> Run:
    model = ours(replay=False).eval()

    @torch.no_grad()
    def run(num_segments: int) -> None:
        state = model.new_state(ROWS)
        for start in range(0, num_segments, PIECE):
            piece = text(min(PIECE, num_segments - start))
            last = start + PIECE >= num_segments
            out = model(piece, state=state, logits_to_keep=1 if last else 0)
            state = state.commit(out.new_entries)

    return run


def backbone_reading() -> Run:
    """The same windows through the same GPT-2 without memory, its head at the end: the floor."""
    model = gpt2().eval()

    @torch.no_grad()
    def run(num_segments: int) -> None:
        for _ in range(num_segments):
            ids = torch.randint(0, VOCAB, (ROWS, SEGMENT + 2 * MEMORY))
            hidden = model.transformer(ids, use_cache=False)[0]
        model.lm_head(hidden[:, -1:])

    return run


def document_lengths() -> list[int]:
    """Segments of the documents: as many of 1 to 2 as of 32 to 64, like texts of the world."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.rand(NUM_DOCUMENTS, generator=generator) * math.log2(LONGEST)
    return [round(2**power) for power in powers.tolist()]


def reading_documents(counts: list[int], *, refill: bool) -> Callable[[], None]:
    """Read documents of so many segments, the same ones both ways."""
    model = ours(replay=False).eval()
    documents = [torch.randint(0, VOCAB, (count * SEGMENT,)) for count in counts]

    def refilled() -> None:
        found = list(model.read_documents(documents, rows=DOCUMENT_ROWS))
        assert len(found) == len(documents)

    @torch.no_grad()
    def in_batches() -> None:
        for start in range(0, len(documents), DOCUMENT_ROWS):
            batch = documents[start : start + DOCUMENT_ROWS]
            ids = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_side="left")
            lengths = torch.tensor([len(document) for document in batch])
            mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
            model(ids, attention_mask=mask, logits_to_keep=1)

    return refilled if refill else in_batches


def time_documents(rounds: int) -> dict[str, Any]:
    """Compare refilled rows, batches, and as many segments in full batches."""
    counts = document_lengths()
    even = [-(-sum(counts) // DOCUMENT_ROWS)] * DOCUMENT_ROWS
    timings = time_pairs(
        {
            "read_documents": reading_documents(counts, refill=True),
            "batches": reading_documents(counts, refill=False),
            "full batch (floor)": reading_documents(even, refill=True),
        },
        rounds,
    )
    seconds = {name: timing.median for name, timing in timings.items()}
    floor = seconds["full batch (floor)"]
    return {
        "segments": counts,
        "seconds": seconds,
        "over the floor": {name: value / floor for name, value in seconds.items()},
    }


def time_lengths(runs: Mapping[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Compare the time of a segment in short and in long documents, in turns."""
    found = {}
    for name, longest in LONG.items():
        timings = time_pairs(
            {
                str(count): lambda run=runs[name], count=count: run(count)
                for count in (SHORT, longest)
            },
            rounds,
        )
        found[name] = {count: timing.median / int(count) for count, timing in timings.items()}
    return found


def peer_model() -> nn.Module:
    from recurrent_memory_transformer_pytorch import (
        RecurrentMemoryTransformer,
        RecurrentMemoryTransformerWrapper,
    )

    torch.manual_seed(0)
    inner = RecurrentMemoryTransformer(
        dim=WIDTH, num_tokens=VOCAB, depth=LAYERS, num_memory_tokens=MEMORY, seq_len=SEGMENT,
        heads=HEADS, dim_head=WIDTH // HEADS, use_flash_attn=True, use_xl_memories=False,
        num_residual_streams=1,
    )  # fmt: skip
    return RecurrentMemoryTransformerWrapper(inner)


def peer_training(*, replay: bool) -> Run:
    model = peer_model()

    def run(num_segments: int) -> None:
        ids = torch.cat([text(num_segments), text(1)[:, :1]], dim=1)
        if replay:
            model(ids, memory_replay_backprop=True)
        else:
            model(ids, return_loss=True)[0].backward()
        model.zero_grad()

    return run


def peer_reading() -> Run:
    model = peer_model().eval()

    @torch.no_grad()
    def run(num_segments: int) -> None:
        model(text(num_segments))

    return run


def authors_model(checkout: str) -> nn.Module:
    sys.path.insert(0, checkout)
    from modeling_rmt.language_modeling import MemoryCell, RecurrentWrapper

    return RecurrentWrapper(
        MemoryCell(gpt2(), MEMORY), segment_size=SEGMENT, max_n_segments=1 << 20, k2=-1
    )


def authors_training(checkout: str) -> Run:
    model = authors_model(checkout)

    def run(num_segments: int) -> None:
        ids = text(num_segments)
        mask = torch.ones_like(ids, dtype=torch.bool)
        model(ids, labels=ids, labels_mask=mask)["loss"].backward()
        model.zero_grad()

    return run


def authors_reading(checkout: str) -> Run:
    model = authors_model(checkout).eval()

    @torch.no_grad()
    def run(num_segments: int) -> None:
        model(text(num_segments))

    return run


def builders(authors: str | None) -> dict[str, Callable[[], Run]]:
    found: dict[str, Callable[[], Run]] = {
        "byheart train, replay": lambda: our_training(replay=True),
        "byheart train, full": lambda: our_training(replay=False),
        "byheart read": our_reading,
        "backbone read": backbone_reading,
    }
    try:
        import recurrent_memory_transformer_pytorch  # noqa: F401
    except ImportError:
        print("A peer is missing: make bench-peers installs it.", file=sys.stderr)
    else:
        found["recurrent-memory-transformer-pytorch train, replay"] = lambda: peer_training(
            replay=True
        )
        found["recurrent-memory-transformer-pytorch train, full"] = lambda: peer_training(
            replay=False
        )
        found["recurrent-memory-transformer-pytorch read"] = peer_reading
    if authors:
        found["authors' wrapper train, full"] = lambda: authors_training(authors)
        found["authors' wrapper read"] = lambda: authors_reading(authors)
    return found


def give_back_free_memory() -> None:
    """Leave nothing resident of what building a model took for a moment.

    Weights are copied once or twice before it stands, and what of that stays differs by tens of MiB
    from process to process.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def whole_peak_bytes() -> int:
    """Say what the process has held at most, the building of its model included.

    For systems that cannot forget a peak: anything but Linux, and containers that forbid it.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_of(name: str, num_segments: int, authors: str | None) -> dict[str, Any]:
    """Measure processes that do nothing else: peak resident MiB."""
    command = [sys.executable, "-m", "benchmarks.rmt", "--only", name, str(num_segments)]
    command += ["--authors", authors] if authors else []
    peaks = []
    for _ in range(PROCESSES if name.startswith("byheart") else 1):
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append(int(output.split()[-1]) / 2**20)
    return {"segments": num_segments, "peak_resident_mib": min(peaks), "all": peaks}


def measure_peaks(found: Iterable[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each run at several lengths, in processes of their own."""
    peaks: dict[str, Any] = {}
    for name in found:
        if name == "backbone read":
            continue
        counts = lengths(name, quick=arguments.quick)
        peaks[name] = [peak_of(name, count, arguments.authors) for count in counts]
        for row in peaks[name]:
            print(
                f"{name:50} {row['segments']:5} segments {row['peak_resident_mib']:8,.0f} MiB",
                flush=True,
            )
    return peaks


def lengths(name: str, *, quick: bool) -> tuple[int, ...]:
    if name.endswith("read"):
        return (4, 16) if quick else (4, 64, 256, 4096) if name.startswith("byheart") else (4, 64)
    if name.endswith("replay"):
        return (4, 16) if quick else (4, 64, 256) if name.startswith("byheart") else (4, 64)
    return (4, 8) if quick else (4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--authors", metavar="CHECKOUT", help="their repository on this machine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", action="store_true", help="measure times again, not peaks")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "SEGMENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    found = builders(arguments.authors)
    if arguments.only:
        name, count = arguments.only
        run = found[name]()
        give_back_free_memory()
        with peak_memory(torch.device("cpu")) as peak:
            run(int(count))
        print(peak.num_bytes or whole_peak_bytes())
        return
    machine = machine_info(["transformers", "recurrent-memory-transformer-pytorch"])
    result: dict[str, Any] = {"machine": machine}
    if arguments.times:
        known = json.loads(arguments.out.read_text(encoding="utf-8"))
        of_peaks = known.get("machine_of_peaks", known["machine"])
        result |= {"peaks": known["peaks"], "machine_of_peaks": of_peaks}
    else:
        result["peaks"] = measure_peaks(found, arguments)
    runs = {name: build() for name, build in found.items()}
    timings = time_pairs(
        {name: lambda run=run: run(8) for name, run in runs.items()}, arguments.rounds
    )
    result["times"] = {name: timing.median / 8 for name, timing in timings.items()}
    result["lengths"] = {} if arguments.quick else time_lengths(runs, arguments.rounds)
    result["ratios"] = ratios(result)
    result["documents"] = time_documents(1 if arguments.quick else arguments.rounds)
    for name, value in result["documents"]["over the floor"].items():
        print(f"{'documents of 1 to 64 segments, over the floor: ' + name:70} {value:8.4f}")
    for name, value in [*result["times"].items(), *result["ratios"].items()]:
        print(f"{name:70} {value:8.4f}")
    if arguments.out:
        write_json(arguments.out, result)


def ratios(result: dict[str, Any]) -> dict[str, float]:
    times, peaks = result["times"], result["peaks"]

    def growth(name: str) -> float:
        rows = peaks[name]
        return float(rows[-1]["peak_resident_mib"] / rows[0]["peak_resident_mib"])

    found = {
        "time of replay over full BPTT": times["byheart train, replay"]
        / times["byheart train, full"],
        "time of reading over the backbone alone": times["byheart read"] / times["backbone read"],
    }
    for name, seconds in result["lengths"].items():
        (first, short), (last, long) = seconds.items()
        found[f"time of a segment of {name}, {last} over {first} segments"] = long / short
    for name, rows in peaks.items():
        first, last = rows[0]["segments"], rows[-1]["segments"]
        found[f"peak of {name}, {last} over {first} segments"] = growth(name)
    return found


if __name__ == "__main__":
    main()

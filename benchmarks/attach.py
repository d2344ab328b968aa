"""What an attached memory adds to a training step of a Hugging Face model.

    python -m benchmarks.attach --out benchmarks/results/attach.json [--quick]

The model is of Llama's shape: 6 layers, width 512, 8 heads of 64, 19M parameters; 4 rows of 512
tokens of text. A step is forward, backward, clipping, AdamW and commit; the memory, in one layer,
is full of keys and values of text, and its gates are open. What is compared with is the same model
with nothing attached.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import machine_info, time_pairs, write_json
from benchmarks.step import ROWS, SEGMENT, TOP_K, VOCAB, Segments, optimize, text_tokens
from byheart import KnnMemoryConfig, attach
from byheart.memory.state import MemoryState

LAYER = 4

Step = Callable[[], None]


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
            num_attention_heads=8, num_key_value_heads=8,
        )
    )  # fmt: skip


def plain_step(tokens: Tensor) -> Step:
    """Build a step of the model alone."""
    model, segments = make_model(), Segments(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        inputs, targets = segments()
        logits = model(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimize(model, optimizer, loss)

    return step


def attached_step(tokens: Tensor, memory_size: int, xl_cache_length: int) -> Step:
    """Build a step of the model with a full memory, or none."""
    memory: dict[str, Any] = {}
    if memory_size:
        knn = KnnMemoryConfig(layers=(LAYER,), memory_size=memory_size, top_k=TOP_K)
        memory = {"knn": knn, "gate_init": 0.3}
    memory_model = attach(
        make_model(), xl_cache_length=xl_cache_length, segment_length=SEGMENT, **memory
    )
    segments = Segments(tokens)
    optimizer = torch.optim.AdamW(memory_model.parameters(), lr=1e-5)
    state = _filled(memory_model, segments, memory_size)

    def step() -> None:
        nonlocal state
        inputs, targets = segments()
        out = memory_model(inputs, state=state, targets=targets)
        optimize(memory_model, optimizer, out.loss)
        state = state.commit(out.new_entries)

    return step


@torch.no_grad()
def _filled(memory_model: torch.nn.Module, segments: Segments, memory_size: int) -> MemoryState:
    # keys and values of the memory layer do not depend on what it reads, so filling need not read
    state, unread = memory_model.new_state(ROWS), memory_model.new_state(ROWS, memory_size=0)
    for _ in range(max(1, memory_size // SEGMENT)):
        entries = memory_model(segments()[0], state=unread).new_entries
        state, unread = state.commit(entries), unread.commit(entries)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="8K entries only, fewer rounds")
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    tokens, info = text_tokens(), machine_info([])
    cases = {"attached, no memory": (0, 0), "memory of 8192": (8192, 0)}
    if not arguments.quick:
        cases |= {
            "memory of 65536": (65_536, 0),
            "XL cache of 512": (0, SEGMENT),
            "memory of 8192, XL cache of 512": (8192, SEGMENT),
        }
    steps = {"the model alone": plain_step(tokens)}
    steps |= {name: attached_step(tokens, *sizes) for name, sizes in cases.items()}
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    timings = {name: timing.median for name, timing in time_pairs(steps, rounds).items()}
    base = timings["the model alone"]
    result = {
        name: {"seconds_per_step": seconds, "ratio_to_the_model_alone": seconds / base}
        for name, seconds in timings.items()
    }
    for name, row in result.items():
        ratio = row["ratio_to_the_model_alone"]
        print(f"{name:40} {row['seconds_per_step']:7.3f} s  x{ratio:.2f}")
    if arguments.out:
        write_json(arguments.out, {"machine": info, "rounds": rounds, "results": result})


if __name__ == "__main__":
    main()

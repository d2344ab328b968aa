"""`byheart generate`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from byheart.cli.common import (
    Bar,
    DeviceOption,
    FolderAsOption,
    SkipBadOption,
    SuffixOption,
    TextKeyOption,
    err_console,
    find_device,
    open_run,
    parse_size,
    print_json,
    progress_bar,
    reading_options,
)
from byheart.data.documents import Document, iter_documents
from byheart.data.tokenize import Tokenizer
from byheart.memory.state import MemoryState
from byheart.models.generate import SamplingConfig
from byheart.models.generate import generate as generate_tokens
from byheart.models.segment_model import SegmentModel
from byheart.models.streaming import read_tokens

# tokens given to the model between two moves of the progress bar
_PIECE = 4096
# what torch takes
_MAX_SEED = 2**64 - 1


def _above_zero(value: float | None) -> float | None:
    if value is not None and not value > 0:
        msg = f"must be above 0, got {value}."
        raise typer.BadParameter(msg)
    return value


_ReadOption = Annotated[
    Path | None, typer.Option(help="Text or folder to read into memory before the prompt.")
]
_MemorySizeOption = Annotated[
    str | None, typer.Option(help="Entries, if not the model's: 8192 or 64K; 0 for none.")
]
_TemperatureOption = Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")]
_TopKOption = Annotated[int | None, typer.Option(min=1, help="Among the so many most likely.")]
_TopPOption = Annotated[
    float | None,
    typer.Option(max=1, callback=_above_zero, help="Among those with this probability."),
]
_SeedOption = Annotated[int, typer.Option(min=0, max=_MAX_SEED, help="Of the sampling.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    model: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    *,
    read: _ReadOption = None,
    folder_as: FolderAsOption = None,
    skip_bad: SkipBadOption = False,
    text_key: TextKeyOption = None,
    suffix: SuffixOption = None,
    memory: Annotated[
        Path | None, typer.Option(help="Go on from a memory that --save-memory wrote.")
    ] = None,
    save_memory: Annotated[
        Path | None, typer.Option(help="Keep what was read, before prompt and new text.")
    ] = None,
    memory_size: _MemorySizeOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 200,
    temperature: _TemperatureOption = 0.8,
    top_k: _TopKOption = None,
    top_p: _TopPOption = None,
    seed: _SeedOption = 0,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Continue a text, with everything read before it in memory."""
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    reading = reading_options(folder_as, skip_bad, text_key, suffix)
    entries = None if memory_size is None else parse_size(memory_size)
    loaded, tokenizer, _ = open_run(model, find_device(device))
    state = _open_memory(loaded, memory, entries)
    if read is not None:
        state = _read(loaded, tokenizer, state, iter_documents(read, **reading))
    if save_memory is not None:
        loaded.save_state(state, save_memory)
    before = {
        "num_tokens_before": int(state.position[0]),
        "num_entries_before": _num_held(state),
        "memory_size": state.memory_size,
    }
    ids = _tokens(tokenizer, prompt, state)
    if ids.shape[1] == 0:
        msg = "Give --prompt a text to continue."
        raise typer.BadParameter(msg)
    new = generate_tokens(
        loaded,
        ids,
        max_new_tokens=max_new_tokens,
        state=state,
        sampling=sampling,
        stop_id=tokenizer.start_id,
        generator=torch.Generator(ids.device).manual_seed(seed),
    )
    added = new.tokens[0, : new.num_tokens[0]].tolist()
    tokens = [token for token in added if token != tokenizer.start_id]
    text = tokenizer.decode(tokens)
    if as_json:
        print_json({"text": text, "num_tokens": len(tokens), **before})
    else:
        print(prompt + text)
        err_console.print(_described(*before.values()), highlight=False)


def _tokens(tokenizer: Tokenizer, text: str, state: MemoryState) -> torch.Tensor:
    ids = [int(token) for token in tokenizer.encode(text)]
    if tokenizer.start_id is not None and int(state.position[0]) == 0:
        ids.insert(0, tokenizer.start_id)
    return torch.tensor([ids], dtype=torch.long, device=state.position.device)


def _described(num_read: int, num_held: int, memory_size: int) -> str:
    held = f"held {num_held:,} of {memory_size:,} entries" if memory_size else "was off"
    return f"Before the prompt {num_read:,} tokens had been read; the kNN memory {held}."


def _num_held(state: MemoryState) -> int:
    # segments that are not complete are not in memory yet, and old entries have left it
    held = [min(int(s.num_written[0]), s.memory_size) for s in state.stores.values()]
    return max(held, default=0)


def _open_memory(model: SegmentModel, saved: Path | None, memory_size: int | None) -> MemoryState:
    if saved is None:
        return model.new_state(1, memory_size=memory_size)
    if memory_size is not None:
        msg = "--memory-size has no effect on a memory that is loaded with --memory. Leave it out."
        raise typer.BadParameter(msg)
    return model.load_state(saved)


def _read(
    model: SegmentModel, tokenizer: Tokenizer, state: MemoryState, documents: Iterable[Document]
) -> MemoryState:
    ids = _tokens(tokenizer, "".join(document.text for document in documents), state)
    with progress_bar("tokens") as progress:
        bar = Bar(progress)
        for start in range(0, ids.shape[1], _PIECE):
            state = read_tokens(model, ids[:, start : start + _PIECE], state).state
            bar.move("read", min(start + _PIECE, ids.shape[1]), ids.shape[1])
    return state

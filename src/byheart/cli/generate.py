"""`byheart generate`."""

from collections.abc import Iterable
from contextlib import suppress
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
from byheart.memory.files import complete_directory
from byheart.memory.persistence import FORMAT
from byheart.memory.state import MemoryState
from byheart.models.generate import Generated, SamplingConfig
from byheart.models.generate import generate as generate_tokens
from byheart.models.segment_model import SegmentModel
from byheart.models.streaming import read_tokens

# tokens given to the model between two moves of the progress bar
_PIECE = 4096
# what torch takes
_MAX_SEED = 2**64 - 1
# scores divided by less than this may not be numbers any more
_MIN_TEMPERATURE = 1e-30


class _TrialError(Exception):
    """Nothing has failed: the place for a memory was only tried."""


def _above_zero(value: float | None) -> float | None:
    if value is not None and not value > 0:
        msg = f"must be above 0, got {value}."
        raise typer.BadParameter(msg)
    return value


def _temperature(value: float) -> float:
    if value != 0 and not value >= _MIN_TEMPERATURE:
        msg = f"must be 0 for the most likely token, or at least {_MIN_TEMPERATURE}, got {value}."
        raise typer.BadParameter(msg)
    return value


_ReadOption = Annotated[
    Path | None, typer.Option(help="Text or folder to read into memory before the prompt.")
]
_SaveMemoryOption = Annotated[
    Path | None,
    typer.Option(help="Keep what was read, before prompt and new text; needs no prompt."),
]
_MemorySizeOption = Annotated[
    str | None, typer.Option(help="Entries, if not the model's: 8192 or 64K; 0 for none.")
]
_TemperatureOption = Annotated[
    float, typer.Option(callback=_temperature, help="0 takes the most likely token.")
]
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
    save_memory: _SaveMemoryOption = None,
    memory_size: _MemorySizeOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 200,
    temperature: _TemperatureOption = 0.8,
    top_k: _TopKOption = None,
    top_p: _TopPOption = None,
    seed: _SeedOption = 0,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Continue a text, with everything read before it in memory, or keep that memory."""
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    reading = reading_options(folder_as, skip_bad, text_key, suffix)
    entries = None if memory_size is None else parse_size(memory_size)
    loaded, tokenizer, _ = open_run(model, find_device(device))
    state = _open_memory(loaded, memory, entries)
    can_continue = _can_continue(tokenizer, prompt, state, read, save_memory)
    if save_memory is not None:
        _require_place(save_memory)
    if read is not None:
        state = _read(loaded, tokenizer, state, iter_documents(read, **reading))
    if save_memory is not None:
        loaded.save_state(state, save_memory)
    before = {
        "num_tokens_before": int(state.position[0]),
        "num_entries_before": _num_held(state),
        "memory_size": state.memory_size,
    }
    text, num_tokens, moment = "", 0, f"Kept in {save_memory}:"
    if can_continue:
        ids, moment = _tokens(tokenizer, prompt, state), "Before the prompt"
        new = generate_tokens(
            loaded,
            ids,
            max_new_tokens=max_new_tokens,
            state=state,
            sampling=sampling,
            stop_id=tokenizer.start_id,
            generator=torch.Generator(ids.device).manual_seed(seed),
        )
        text, num_tokens = _decoded(tokenizer, new)
    if as_json:
        print_json({"text": text, "num_tokens": num_tokens, **before})
        return
    if can_continue:
        print(prompt + text)
    err_console.print(f"{moment} {_described(*before.values())}", highlight=False, markup=False)


def _can_continue(
    tokenizer: Tokenizer,
    prompt: str,
    state: MemoryState,
    read: Path | None,
    save_memory: Path | None,
) -> bool:
    """Tell whether there will be a token to continue from, before anything is read.

    Returns:
        Whether the prompt has one, or stands at the start, where the start token is put before it.

    Raises:
        BadParameter: If there will be none, and nothing to keep either.
    """
    is_start = read is None and int(state.position[0]) == 0
    found = len(tokenizer.encode(prompt)) > 0 or (is_start and tokenizer.start_id is not None)
    if not found and (read is None or save_memory is None):
        msg = "Give --prompt a text to continue, or --read and --save-memory to keep what is read."
        raise typer.BadParameter(msg)
    return found


def _require_place(place: Path) -> None:
    """Try all that saving a memory does but for the memory, before hours of reading.

    Raises:
        BadParameter: If the place cannot be written to.
    """
    try:
        # what is there stays as it is where the writing fails
        with suppress(_TrialError), complete_directory(place, {"format": FORMAT}):
            raise _TrialError
    except OSError as error:
        msg = (
            f"--save-memory must be a place that can be written to, got {place}: {error}. Nothing "
            "was read. Name another."
        )
        raise typer.BadParameter(msg) from error


def _tokens(tokenizer: Tokenizer, text: str, state: MemoryState) -> torch.Tensor:
    ids = [int(token) for token in tokenizer.encode(text)]
    if tokenizer.start_id is not None and int(state.position[0]) == 0:
        ids.insert(0, tokenizer.start_id)
    return torch.tensor([ids], dtype=torch.long, device=state.position.device)


def _decoded(tokenizer: Tokenizer, new: Generated) -> tuple[str, int]:
    added = new.tokens[0, : new.num_tokens[0]].tolist()
    tokens = [token for token in added if token != tokenizer.start_id]
    return tokenizer.decode(tokens), len(tokens)


def _described(num_read: int, num_held: int, memory_size: int) -> str:
    held = f"held {num_held:,} of {memory_size:,} entries" if memory_size else "was off"
    return f"{num_read:,} tokens had been read; the kNN memory {held}."


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

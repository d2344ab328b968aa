"""`byheart doctor`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from byheart.cli.common import parse_size, print_json
from byheart.config import apply_overrides, from_dict

if TYPE_CHECKING:
    from byheart.adapters.doctor import Diagnosis

_OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change an option of attach: memory_position=local. Repeatable."),
]

# from the end: the paper's memory is in one of the last layers
_DEFAULT_LAYER = -4


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    model: Annotated[str, typer.Argument(help="Folder with a config.json, or name on the hub.")],
    *,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers with the memory, from 0, or from the end: -1 is the last; default: -4, "
            "or 0 of fewer layers."
        ),
    ] = None,
    memory_size: Annotated[str, typer.Option(help="Entries: 8192 or 64K; 0 for none.")] = "64K",
    segment: Annotated[int, typer.Option(min=1, help="Tokens of a segment.")] = 512,
    xl_cache: Annotated[int, typer.Option(min=0, help="Tokens of the XL cache.")] = 0,
    tokens: Annotated[
        str | None, typer.Option(help="Length of a document whose reading is estimated: 128K.")
    ] = None,
    overrides: _OverridesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say whether a model can have a kNN memory, and what it would cost, without its weights."""
    # brings transformers, which --help need not wait for
    from byheart.adapters.attach_config import AttachConfig
    from byheart.adapters.doctor import diagnose
    from byheart.adapters.loading import count_layers, load_config_of

    length = None if tokens is None else parse_size(tokens, "--tokens")
    if length == 0:
        msg = "--tokens must be at least 1, got 0."
        raise typer.BadParameter(msg)
    model_config = load_config_of(model)
    depth = count_layers(model_config)
    default = _DEFAULT_LAYER if depth is None else max(_DEFAULT_LAYER, -depth)
    size = parse_size(memory_size)
    knn = {
        "layers": [default] if layers is None else _numbers(layers),
        "memory_size": size,
        "top_k": min(32, size),
    }
    options = {"segment_length": segment, "xl_cache_length": xl_cache}
    try:
        config = from_dict(AttachConfig, {**options, "knn": knn if size else None})
        config = apply_overrides(config, overrides or [])
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    if depth is not None and config.knn is not None:
        _require_layers(config.knn.layers, depth)
    diagnosis = diagnose(model_config, config)
    if as_json:
        seconds = None if length is None else diagnosis.document_seconds(length)
        document = {"num_tokens": length, "model_and_memory_seconds": seconds}
        print_json(
            {
                "is_supported": diagnosis.is_supported,
                **asdict(diagnosis),
                **({} if length is None else {"document": document}),
            }
        )
    else:
        print(_text(model, diagnosis, length))
    if not diagnosis.is_supported:
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        msg = f"--layers must be numbers such as 8 or 4,8, got {text!r}."
        raise typer.BadParameter(msg) from error


def _require_layers(layers: tuple[int, ...], depth: int) -> None:
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong:
        msg = (
            f"--layers must be between 0 and {depth - 1}, or count from the end between {-depth} "
            f"and -1, for a model of {depth} layers, got {wrong[0]}."
        )
        raise typer.BadParameter(msg)


def _document(diagnosis: "Diagnosis", length: int) -> str:
    limit, seconds = diagnosis.max_document_tokens, diagnosis.document_seconds(length)
    if limit is not None and length > limit:
        return (
            f"A document of {length:,} tokens is beyond the {limit:,} positions of the model, into "
            "which it must fit with an XL cache."
        )
    if seconds is None:
        return "How long a document takes is estimated for the store 'dense' alone."
    alone, added = seconds
    text = f"A document of {length:,} tokens: about {alone:,.1f} s without memory"
    if not diagnosis.memory_size:
        return f"{text}."
    return f"{text} and {alone + added:,.1f} s with it ({1 + added / alone:.2f} times)."


def _text(model: str, diagnosis: "Diagnosis", length: int | None) -> str:
    if diagnosis.reason is not None:
        # what follows is a list of all that transformers knows
        reason = diagnosis.reason.partition("\n")[0]
        return (
            f"{model} ({diagnosis.model_type}) cannot have a kNN memory. {reason}\n"
            "Encoders, encoder-decoders and decoders can have a recurrent memory: "
            "byheart.RecurrentMemory, docs/recurrent-memory.md."
        )
    rotations = ", ".join(dict.fromkeys(diagnosis.rotations))
    lines = [
        f"{model} ({diagnosis.model_type}) can have a kNN memory.",
        f"Parameters: {diagnosis.num_parameters:,}, in {len(diagnosis.layers)} layers; "
        f"rotation of keys: {rotations}.",
    ]
    if diagnosis.memory_layers:
        lines.append(
            f"Memory in {', '.join(diagnosis.memory_layers)}: "
            f"{diagnosis.memory_bytes / 2**20:,.1f} MiB per row when full; its exact search "
            f"is {diagnosis.search_share:.1%} of the arithmetic of the model's weights."
        )
    if diagnosis.read_microseconds is not None and diagnosis.model_microseconds is not None:
        lines.append(
            f"Reading it full adds about {diagnosis.read_microseconds:,.1f} microseconds to the "
            f"{diagnosis.model_microseconds:,.1f} of a token on this machine, in whole segments "
            "and without a backward pass (estimates)."
        )
    if length is not None:
        lines.append(_document(diagnosis, length))
    if diagnosis.xl_cache_bytes:
        lines.append(f"XL cache: {diagnosis.xl_cache_bytes / 2**20:,.1f} MiB per row.")
    return "\n".join(lines)

"""`byheart flops`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer

from byheart.cli.common import parse_sizes, print_json
from byheart.config import apply_overrides
from byheart.errors import DataError
from byheart.evaluation.flops import CONVENTIONS, FlopsConvention
from byheart.evaluation.flops_compare import FlopsComparison, compare_flops
from byheart.evaluation.flops_config import find_shape
from byheart.evaluation.flops_shapes import ModelShape
from byheart.memory.config import KnnMemoryConfig

REPORT_MODELS = ("opt-125m", "opt-1.3b", "opt-6.7b", "opt-30b", "opt-175b")
"""The models of Figure 3 of the report on RMT."""

REPORT_MEMORY_TOKENS = 10
"""Memory tokens of the models in the report."""


_ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="opt-125m, bert-base, gpt2, llama-3-8b and their kin, or a config.json. Repeatable; "
        "default: the five OPT models of the report.",
    ),
]
_SoftmaxOption = Annotated[
    int | None, typer.Option(min=0, help="FLOPs per score; default: report 10, honest 5.")
]
_VocabularyOption = Annotated[
    int | None,
    typer.Option(min=0, max=2, help="0: none, 1: logits, 2: embedding and logits."),
]
_MemorySizeOption = Annotated[
    str, typer.Option(help="Slots of a kNN memory: 8192 or 64K, honest only; 0 for none.")
]
_TopKOption = Annotated[
    int | None, typer.Option(min=1, help="Entries each query retrieves; default: 32.")
]
_MemoryLayersOption = Annotated[
    int | None, typer.Option(min=1, help="Number of layers with the kNN memory; default: 1.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("flops")(flops)


def flops(
    *,
    models: _ModelsOption = None,
    tokens: Annotated[
        str, typer.Option(help="Lengths of the document: 32000,2048000; 2M is 2 x 1024 x 1024.")
    ] = "2048000",
    segment: Annotated[
        int,
        typer.Option(min=1, help="Tokens per segment; of an encoder the window, memory included."),
    ] = 512,
    convention: Annotated[
        str, typer.Option(help="report: the formula of the RMT report. honest: what must be done.")
    ] = "report",
    num_memory_tokens: Annotated[
        int | None, typer.Option(min=0, help="Memory tokens, honest only; default: 10.")
    ] = None,
    memory_size: _MemorySizeOption = "0",
    top_k: _TopKOption = None,
    memory_layers: _MemoryLayersOption = None,
    softmax_flops: _SoftmaxOption = None,
    vocab_matmuls: _VocabularyOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a width of the models: num_layers=24. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Count the FLOPs of full attention and of segments with a recurrent memory."""
    settings = _Settings(
        convention=_convention(convention, softmax_flops, vocab_matmuls),
        segment_length=segment,
        num_memory_tokens=_memory_tokens(convention, num_memory_tokens),
        knn_memory=_knn_memory(convention, memory_size, top_k, memory_layers),
        overrides=tuple(overrides or ()),
    )
    with _wrong_usage():
        lengths = parse_sizes(tokens)
        shapes = [
            apply_overrides(find_shape(name), settings.overrides)
            for name in models or REPORT_MODELS
        ]
        comparisons = [settings.compare(shape, length) for shape in shapes for length in lengths]
    if as_json:
        results = [{**item.to_dict(), "shape": asdict(item.shape)} for item in comparisons]
        print_json({"settings": settings.to_dict(), "results": results})
    else:
        _show(comparisons, settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    convention: FlopsConvention
    segment_length: int
    num_memory_tokens: int
    knn_memory: KnnMemoryConfig | None
    overrides: tuple[str, ...]

    def compare(self, shape: ModelShape, num_tokens: int) -> FlopsComparison:
        return compare_flops(
            shape,
            num_tokens,
            segment_length=self.segment_length,
            num_memory_tokens=self.num_memory_tokens,
            knn_memory=self.knn_memory,
            convention=self.convention,
        )

    def to_dict(self) -> dict[str, object]:
        knn = self.knn_memory
        return {
            "convention": asdict(self.convention),
            "segment_length": self.segment_length,
            "num_memory_tokens": self.num_memory_tokens,
            "overrides": list(self.overrides),
            "knn_memory": None
            if knn is None
            else {
                "memory_size": knn.memory_size,
                "top_k": knn.top_k,
                "num_layers": len(knn.layers),
            },
        }

    def title(self) -> str:
        parts = [f"convention {self.convention.name}", f"segments of {self.segment_length}"]
        if self.num_memory_tokens:
            parts.append(f"{self.num_memory_tokens} memory tokens")
        if self.knn_memory is not None:
            knn = self.knn_memory
            parts.append(f"top {knn.top_k} of {knn.memory_size:,} (layers: {len(knn.layers)})")
        return "FLOPs of a forward pass: " + ", ".join([*parts, *self.overrides])


def _convention(name: str, softmax_flops: int | None, vocab_matmuls: int | None) -> FlopsConvention:
    if name not in CONVENTIONS:
        msg = f"--convention must be {' or '.join(CONVENTIONS)}, got {name!r}."
        raise typer.BadParameter(msg)
    convention = CONVENTIONS[name]
    if softmax_flops is not None:
        label = f"{convention.name}, softmax {softmax_flops}"
        convention = replace(convention, name=label, softmax_flops=softmax_flops)
    if vocab_matmuls is not None:
        label = f"{convention.name}, {vocab_matmuls} vocabulary products"
        convention = replace(convention, name=label, vocab_matmuls=vocab_matmuls)
    return convention


def _memory_tokens(convention: str, num_memory_tokens: int | None) -> int:
    counts_memory = CONVENTIONS[convention].counts_memory
    if num_memory_tokens and not counts_memory:
        msg = "--num-memory-tokens needs --convention honest: the report's formula has none."
        raise typer.BadParameter(msg)
    if num_memory_tokens is None:
        return REPORT_MEMORY_TOKENS if counts_memory else 0
    return num_memory_tokens


def _knn_memory(
    convention: str, memory_size: str, top_k: int | None, memory_layers: int | None
) -> KnnMemoryConfig | None:
    with _wrong_usage():
        sizes = parse_sizes(memory_size)
    if len(sizes) != 1:
        msg = f"--memory-size must be one size, got {memory_size!r}."
        raise typer.BadParameter(msg)
    if not sizes[0]:
        if top_k is not None or memory_layers is not None:
            msg = "--top-k and --memory-layers have no effect without --memory-size."
            raise typer.BadParameter(msg)
        return None
    if not CONVENTIONS[convention].counts_memory:
        msg = "--memory-size needs --convention honest: the report's formula has no kNN memory."
        raise typer.BadParameter(msg)
    # which layers have it makes no difference to the count
    layers = tuple(range(memory_layers or 1))
    with _wrong_usage():
        return KnnMemoryConfig(layers=layers, memory_size=sizes[0], top_k=top_k or 32)


@contextmanager
def _wrong_usage() -> Iterator[None]:
    """Blame values on the options they came from, but not the content of a file.

    Raises:
        BadParameter: If a value is refused.
    """
    try:
        yield
    except DataError:
        raise
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


def _show(comparisons: Sequence[FlopsComparison], settings: _Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    names = ["model", "tokens", "full attention", "RMT", "ratio", "full per token", "RMT per token"]
    rows = [_row(item) for item in comparisons]
    if settings.convention.counts_memory:
        names.insert(5, "without vocab.")
        for row, item in zip(rows, comparisons, strict=True):
            row.insert(5, f"{item.ratio_without_vocabulary:.3f}")
    # narrow enough for 80 columns: headers break between words, and only the model's name in words
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column, name in enumerate(names):
        width = max(map(len, [*name.split(), *(row[column] for row in rows if column)]))
        table.add_column(
            name, justify="right" if column else "left", overflow="fold", min_width=width
        )
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(settings.title(), markup=False, highlight=False)
    console.print(table)


def _row(item: FlopsComparison) -> list[str]:
    return [
        item.shape.name,
        f"{item.num_tokens:,}",
        f"{item.full_attention.total:.2e}",
        f"{item.recurrent.total:.2e}",
        f"{item.ratio:.3f}",
        f"{item.full_attention.total / item.num_tokens:.2e}",
        f"{item.recurrent.total / item.num_tokens:.2e}",
    ]

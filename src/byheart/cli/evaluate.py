"""`byheart evaluate`."""

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from byheart.cli.common import (
    Bar,
    TrainedModel,
    err_console,
    open_run,
    parse_sizes,
    print_json,
    progress_bar,
    tokenize_progress,
)
from byheart.config import load_config, write_text_atomic
from byheart.data.token_cache import tokenize_corpus
from byheart.errors import DataError
from byheart.evaluation.perplexity import EvaluationProgress, evaluate_perplexity
from byheart.evaluation.plots import plot_loss_by_position, plot_perplexity
from byheart.evaluation.result import PerplexityResult
from byheart.training.config import RunConfig


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    documents: Annotated[
        Path | None, typer.Argument(help="Documents; without them the run's validation documents.")
    ] = None,
    *,
    memory_size: Annotated[
        str, typer.Option(help="Sizes of the kNN memory, 0 for none: 0,2048,8K,64K.")
    ] = "",
    xl_cache: Annotated[str, typer.Option(help="with, without or both.")] = "with",
    rows: Annotated[int, typer.Option(help="Documents read side by side.")] = 8,
    max_documents: Annotated[int | None, typer.Option(help="Only the first so many.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Only so many of each document.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for result and plots; default: RUN/evaluation.")
    ] = None,
    plot: Annotated[bool, typer.Option(help="Draw perplexity and loss by position.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure perplexity by memory size and loss by position in the document."""
    if xl_cache not in ("with", "without", "both"):
        msg = f"--xl-cache must be with, without or both, got {xl_cache!r}."
        raise typer.BadParameter(msg)
    try:
        sizes = parse_sizes(memory_size) if memory_size else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    trained = open_run(model)
    run = load_config(RunConfig, model / "config.json")
    result = _measure(
        trained,
        run,
        documents,
        memory_sizes=sizes or run.evaluation.memory_sizes or (None,),
        xl_cache=cast("Literal['with', 'without', 'both']", xl_cache),
        rows=rows,
        max_documents=max_documents or run.evaluation.max_documents,
        max_tokens=max_tokens or run.evaluation.max_tokens,
    )
    directory = out or model / "evaluation"
    directory.mkdir(parents=True, exist_ok=True)
    written = _write(result, directory, plot=plot)
    if as_json:
        print_json({**result.to_dict(), "files": [str(path) for path in written]})
        return
    from rich.console import Console

    Console().print(result.to_rich())
    for path in written:
        print(path)


def _measure(
    trained: TrainedModel,
    run: RunConfig,
    documents: Path | None,
    *,
    memory_sizes: tuple[int | None, ...],
    xl_cache: Literal["with", "without", "both"],
    rows: int,
    max_documents: int | None,
    max_tokens: int | None,
) -> PerplexityResult:
    path = documents or run.data.validation
    if path is None:
        msg = f"The run {trained.run_dir} has no validation documents. Name some: byheart evaluate "
        msg += f"{trained.run_dir} DOCUMENTS"
        raise DataError(msg)
    with tokenize_progress() as on_tokenize:
        corpus = tokenize_corpus(
            path,
            trained.tokenizer,
            run.data.cache_dir,
            on_bad=run.data.on_bad,
            folder_as=run.data.folder_as,
            text_key=run.data.text_key,
            suffixes=run.data.suffixes,
            on_progress=on_tokenize,
        )
    with progress_bar("tokens") as progress:
        bar = Bar(progress)

        def show(now: EvaluationProgress) -> None:
            bar.move("evaluate", now.num_tokens, now.total_tokens)

        return evaluate_perplexity(
            trained.decoder,
            corpus,
            memory_sizes=memory_sizes,
            rows=rows,
            max_documents=max_documents,
            max_tokens_per_document=max_tokens,
            xl_cache=xl_cache,
            tokenizer=trained.tokenizer,
            on_progress=show,
        )


def _write(result: PerplexityResult, directory: Path, *, plot: bool) -> list[Path]:
    import json

    written = [directory / "result.json", directory / "result.md"]
    write_text_atomic(written[0], json.dumps(result.to_dict(), indent=2))
    write_text_atomic(written[1], result.to_markdown())
    if plot:
        try:
            written.append(plot_perplexity(result, directory / "perplexity.png"))
            written.append(plot_loss_by_position(result, directory / "loss_by_position.png"))
        except ImportError as error:
            err_console.print(f"No plots: {error}", highlight=False)
    return written

"""`byheart evaluate`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from byheart.cli.common import (
    Bar,
    DeviceOption,
    FolderAsOption,
    ReadingOptions,
    SkipBadOption,
    SuffixOption,
    TextKeyOption,
    TrainedModel,
    err_console,
    find_device,
    open_run,
    parse_sizes,
    print_json,
    progress_bar,
    reading_options,
    tokenize_progress,
)
from byheart.config import load_config, write_text_atomic
from byheart.data.corpus import TokenizedCorpus
from byheart.data.token_cache import tokenize_corpus
from byheart.errors import DataError
from byheart.evaluation.perplexity import EvaluationProgress, evaluate_perplexity
from byheart.evaluation.plots import plot_loss_by_position, plot_perplexity
from byheart.evaluation.result import PerplexityResult
from byheart.models.fingerprint import model_fingerprint
from byheart.training.config import RunConfig

XlCache = Literal["with", "without", "both"]


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
    rows: Annotated[int, typer.Option(min=1, help="Documents read side by side.")] = 8,
    max_documents: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Only so many of each document.")
    ] = None,
    folder_as: FolderAsOption = None,
    skip_bad: SkipBadOption = False,
    text_key: TextKeyOption = None,
    suffix: SuffixOption = None,
    device: DeviceOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for result and plots; default: RUN/evaluation.")
    ] = None,
    plot: Annotated[bool, typer.Option(help="Draw perplexity and loss by position.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure perplexity by memory size and loss by position in the document."""
    chosen = _xl_cache(xl_cache)
    try:
        sizes = parse_sizes(memory_size) if memory_size else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    reading = reading_options(folder_as, skip_bad, text_key, suffix)
    if documents is None and reading:
        msg = "Options for reading need DOCUMENTS: the run's own are read as the run read them."
        raise typer.BadParameter(msg)
    trained = open_run(model, find_device(device))
    run = load_config(RunConfig, model / "config.json")
    caps = _Caps(rows=rows, max_documents=max_documents, max_tokens_per_document=max_tokens)
    if documents is None:
        documents, reading = _validation(run, model)
        caps = _inherit(caps, run)
    if sizes is None:
        sizes = run.evaluation.memory_sizes
    corpus = _tokenize(trained, run, documents, reading)
    result = _measure(trained, corpus, (None,) if sizes is None else sizes, chosen, caps)
    settings = _settings(trained, documents, chosen, caps)
    directory = out or model / "evaluation"
    written = _write(result, settings, directory, plot=plot)
    if as_json:
        files = [str(path) for path in written]
        print_json({"settings": settings, **result.to_dict(), "files": files})
        return
    from rich.console import Console

    Console().print(result.to_rich())
    for path in written:
        print(path)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Caps:
    rows: int
    max_documents: int | None
    max_tokens_per_document: int | None


def _xl_cache(text: str) -> XlCache:
    if text not in ("with", "without", "both"):
        msg = f"--xl-cache must be with, without or both, got {text!r}."
        raise typer.BadParameter(msg)
    return cast("XlCache", text)


def _validation(run: RunConfig, model: Path) -> tuple[Path, ReadingOptions]:
    data = run.data
    if data.validation is None:
        msg = f"The run {model} has no validation documents. Name some: byheart evaluate {model} "
        msg += "DOCUMENTS"
        raise DataError(msg)
    reading = ReadingOptions(on_bad=data.on_bad, folder_as=data.folder_as, text_key=data.text_key)
    if data.suffixes is not None:
        reading["suffixes"] = data.suffixes
    return Path(data.validation), reading


def _settings(
    trained: TrainedModel, documents: Path, xl_cache: XlCache, caps: _Caps
) -> dict[str, object]:
    return {
        "model": str(trained.run_dir),
        "model_fingerprint": model_fingerprint(trained.model),
        "tokenizer_fingerprint": trained.tokenizer.fingerprint,
        "documents": str(documents),
        **asdict(caps),
        "xl_cache": xl_cache,
        "device": str(trained.model.device),
        "versions": {name: version(name) for name in ("byheart", "torch")},
    }


def _inherit(caps: _Caps, run: RunConfig) -> _Caps:
    """Cap the run's own documents as the run did, unless told otherwise, and say so.

    Returns:
        The caps to use.
    """
    if caps.max_documents is None and run.evaluation.max_documents is not None:
        caps = replace(caps, max_documents=run.evaluation.max_documents)
        _say(f"As in the run: the first {caps.max_documents:,} documents (--max-documents).")
    if caps.max_tokens_per_document is None and run.evaluation.max_tokens is not None:
        caps = replace(caps, max_tokens_per_document=run.evaluation.max_tokens)
        tokens = caps.max_tokens_per_document
        _say(f"As in the run: the first {tokens:,} tokens of each document (--max-tokens).")
    return caps


def _say(text: str) -> None:
    err_console.print(text, highlight=False)


def _tokenize(
    trained: TrainedModel, run: RunConfig, documents: Path, reading: ReadingOptions
) -> TokenizedCorpus:
    with tokenize_progress() as on_progress:
        return tokenize_corpus(
            documents, trained.tokenizer, run.data.cache_dir, on_progress=on_progress, **reading
        )


def _measure(
    trained: TrainedModel,
    corpus: TokenizedCorpus,
    memory_sizes: tuple[int | None, ...],
    xl_cache: XlCache,
    caps: _Caps,
) -> PerplexityResult:
    with progress_bar("tokens") as progress:
        bar = Bar(progress)

        def show(now: EvaluationProgress) -> None:
            bar.move("evaluate", now.num_tokens, now.total_tokens)

        return evaluate_perplexity(
            trained.model,
            corpus,
            memory_sizes=memory_sizes,
            xl_cache=xl_cache,
            tokenizer=trained.tokenizer,
            on_progress=show,
            **asdict(caps),
        )


def _write(
    result: PerplexityResult, settings: Mapping[str, object], directory: Path, *, plot: bool
) -> list[Path]:
    import json

    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "result.json", directory / "result.md"]
    content = {"settings": settings, **result.to_dict()}
    write_text_atomic(written[0], json.dumps(content, indent=2, allow_nan=False))
    write_text_atomic(written[1], result.to_markdown())
    if plot:
        try:
            written.append(plot_perplexity(result, directory / "perplexity.png"))
            written.append(plot_loss_by_position(result, directory / "loss_by_position.png"))
        except ImportError as error:
            err_console.print(f"No plots: {error}", highlight=False)
    return written

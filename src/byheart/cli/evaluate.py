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
    prepare_output,
    print_json,
    progress_bar,
    reading_options,
    tokenize_progress,
)
from byheart.cli.suites import (
    FewShotOption,
    IncludePathOption,
    KeysOption,
    LengthsOption,
    LimitOption,
    SamplesOption,
    StoriesOption,
    SuiteOption,
    SuiteOptions,
    TasksOption,
    run_suite,
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

DocumentsArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Documents; without them the run's validation documents. For probes the text around "
        "what is to be found; without them short stories."
    ),
]
MemorySizeOption = Annotated[
    str, typer.Option(help="Sizes of the kNN memory, 0 for none: 0,2048,8K,64K.")
]
XlCacheOption = Annotated[str | None, typer.Option(help="with, without or both; default: with.")]
RowsOption = Annotated[int, typer.Option(min=1, help="Documents read side by side.")]
MaxDocumentsOption = Annotated[int | None, typer.Option(min=1, help="Only the first so many.")]
MaxTokensOption = Annotated[int | None, typer.Option(min=2, help="Only so many of each document.")]
OutOption = Annotated[
    Path | None, typer.Option(help="Directory for result and plots; default: RUN/evaluation.")
]
PlotOption = Annotated[bool, typer.Option(help="Draw perplexity and loss by position.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    documents: DocumentsArgument = None,
    *,
    suite: SuiteOption = "perplexity",
    memory_size: MemorySizeOption = "",
    xl_cache: XlCacheOption = None,
    rows: RowsOption = 8,
    max_documents: MaxDocumentsOption = None,
    max_tokens: MaxTokensOption = None,
    folder_as: FolderAsOption = None,
    skip_bad: SkipBadOption = False,
    text_key: TextKeyOption = None,
    suffix: SuffixOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    plot: PlotOption = True,
    lengths: LengthsOption = None,
    samples: SamplesOption = None,
    keys: KeysOption = None,
    stories: StoriesOption = None,
    tasks: TasksOption = None,
    few_shot: FewShotOption = None,
    limit: LimitOption = None,
    include_path: IncludePathOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity by memory size and loss by position in the document, or another suite."""
    options = SuiteOptions(
        lengths=lengths, samples=samples, keys=keys, stories=stories, tasks=tasks,
        few_shot=few_shot, limit=limit, include_path=include_path,
    )  # fmt: skip
    own = {
        "xl_cache": xl_cache, "max_documents": max_documents, "max_tokens": max_tokens,
        "folder_as": folder_as, "skip_bad": skip_bad or None, "text_key": text_key,
        "suffix": suffix,
    }  # fmt: skip
    options.require_fit(suite, own, documents)
    reading = reading_options(folder_as, skip_bad, text_key, suffix)
    place = _Place(device=device, out=out or model / "evaluation", plot=plot, as_json=as_json)
    sizes = _memory_sizes(memory_size)
    if suite == "perplexity":
        caps = _Caps(rows=rows, max_documents=max_documents, max_tokens_per_document=max_tokens)
        _perplexity(model, documents, reading, sizes, _xl_cache(xl_cache or "with"), caps, place)
        return
    trained = open_run(model, find_device(device))
    prepare_output(place.out)
    run_suite(
        suite,
        trained,
        options,
        background=documents,
        memory_sizes=sizes or (None,),
        rows=rows,
        out=place.out,
        as_json=as_json,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    device: str | None
    out: Path
    plot: bool
    as_json: bool


def _memory_sizes(text: str) -> tuple[int, ...] | None:
    try:
        return parse_sizes(text) if text else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _perplexity(
    model: Path,
    documents: Path | None,
    reading: ReadingOptions,
    sizes: tuple[int | None, ...] | None,
    xl_cache: XlCache,
    caps: "_Caps",
    place: _Place,
) -> None:
    if documents is None and reading:
        msg = "Options for reading need DOCUMENTS: the run's own are read as the run read them."
        raise typer.BadParameter(msg)
    trained = open_run(model, find_device(place.device))
    prepare_output(place.out)
    run = load_config(RunConfig, model / "config.json")
    if documents is None:
        documents, reading = _validation(run, model)
        caps = _inherit(caps, run)
    if sizes is None:
        sizes = run.evaluation.memory_sizes
    corpus = _tokenize(trained, run, documents, reading)
    result = _measure(trained, corpus, (None,) if sizes is None else sizes, xl_cache, caps)
    settings = _settings(trained, documents, xl_cache, caps)
    written = _write(result, settings, place.out, plot=place.plot)
    if place.as_json:
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
    if not Path(data.validation).exists():
        msg = (
            f"The validation documents of the run must be where {model / 'config.json'} says, "
            f"{data.validation}, and are not there (relative paths are sought from here, "
            f"{Path.cwd()}). Name them: byheart evaluate {model} DOCUMENTS"
        )
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

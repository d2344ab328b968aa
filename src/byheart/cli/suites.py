"""Suites of `byheart evaluate` other than perplexity: probes of memory, and lm-eval's tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from byheart.cli.common import Bar, TrainedModel, parse_sizes, progress_bar
from byheart.cli.reproduce_output import show_output, write_output
from byheart.models.fingerprint import model_fingerprint

ProbeSuite = Literal["passkey", "multi-key", "babi"]
Suite = Literal["perplexity", "passkey", "multi-key", "babi", "lm-eval"]

_DEFAULT_LENGTHS = "512,2K,8K,32K"
_DEFAULT_SAMPLES = 50
_PROBES, _HARNESS = "Probes of memory", "Tasks of lm-eval"

SuiteOption = Annotated[
    Suite,
    typer.Option(
        help="What to measure: perplexity on documents; whether a passkey, one of several keys or "
        "the facts of a bAbI story are found again in a long text; or tasks of lm-eval."
    ),
]
LengthsOption = Annotated[
    str | None,
    typer.Option(help=f"Lengths in tokens; default: {_DEFAULT_LENGTHS}.", rich_help_panel=_PROBES),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        min=1, help=f"Texts of each length; default: {_DEFAULT_SAMPLES}.", rich_help_panel=_PROBES
    ),
]
KeysOption = Annotated[
    int | None,
    typer.Option("--keys", min=2, help="Keys of multi-key; default: 8.", rich_help_panel=_PROBES),
]
StoriesOption = Annotated[
    Path | None,
    typer.Option(help="Stories of babi: bAbI's own file or JSON lines.", rich_help_panel=_PROBES),
]
TasksOption = Annotated[
    str | None,
    typer.Option(help="Names of tasks: lambada_openai,arc_easy.", rich_help_panel=_HARNESS),
]
FewShotOption = Annotated[
    int | None,
    typer.Option(min=0, help="Solved examples before each question.", rich_help_panel=_HARNESS),
]
LimitOption = Annotated[
    int | None,
    typer.Option(min=1, help="Only the first questions of a task.", rich_help_panel=_HARNESS),
]
IncludePathOption = Annotated[
    Path | None, typer.Option(help="Folder with more tasks.", rich_help_panel=_HARNESS)
]


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteOptions:
    """Options of `byheart evaluate` that belong to some suites only; `None` where not given."""

    lengths: str | None
    samples: int | None
    keys: int | None
    stories: Path | None
    tasks: str | None
    few_shot: int | None
    limit: int | None
    include_path: Path | None

    def require_fit(
        self, suite: Suite, others: Mapping[str, object], documents: Path | None
    ) -> None:
        """Refuse options that the suite has no use for.

        Args:
            suite: The suite.
            others: Options of perplexity alone.
            documents: Those named by the user.

        Raises:
            BadParameter: If there is one, or one is missing.
        """
        probe = ("lengths", "samples")
        used = {
            "perplexity": tuple(others),
            "passkey": probe,
            "multi-key": (*probe, "keys"),
            "babi": (*probe, "stories"),
            "lm-eval": ("tasks", "few_shot", "limit", "include_path"),
        }[suite]
        names = (*type(self).__dataclass_fields__, *others)
        values = {name: getattr(self, name, None) for name in names} | dict(others)
        given = {name for name, value in values.items() if value is not None}
        if surplus := sorted(given - set(used)):
            flags = ", ".join("--" + name.replace("_", "-") for name in surplus)
            msg = f"--suite {suite} has no use for {flags}. Leave it out."
            raise typer.BadParameter(msg)
        if suite == "lm-eval" and documents is not None:
            msg = "--suite lm-eval reads its tasks, and has no use for DOCUMENTS. Leave them out."
            raise typer.BadParameter(msg)
        needed = {"babi": "stories", "lm-eval": "tasks"}.get(suite)
        if needed is not None and needed not in given:
            msg = f"--suite {suite} needs --{needed}."
            raise typer.BadParameter(msg)


def run_suite(
    suite: ProbeSuite | Literal["lm-eval"],
    trained: TrainedModel,
    options: SuiteOptions,
    *,
    background: Path | None,
    memory_sizes: Sequence[int | None],
    rows: int,
    out: Path,
    as_json: bool,
) -> None:
    """Measure a model on a suite, write the result and show it.

    Args:
        suite: Any but perplexity.
        trained: Model and tokenizer.
        options: Of the suite.
        background: Documents around what is to be found; `None` for byheart's stories.
        memory_sizes: Entries of the kNN memory; `None` for what the model has.
        rows: Texts read side by side.
        out: Directory for the result.
        as_json: Whether to print JSON.
    """
    if suite == "lm-eval":
        result, table = _harness(trained, options, memory_sizes, rows)
    else:
        result, table = _probe(suite, trained, options, background, memory_sizes, rows)
    settings = {
        "model": str(trained.run_dir),
        "model_fingerprint": model_fingerprint(trained.model),
        "background": None if background is None else str(background),
        "device": str(trained.model.device),
        "versions": {name: version(name) for name in ("byheart", "torch")},
    }
    result = {"settings": settings, **result}
    files = write_output(out, suite, result, table, None)
    show_output(result, table, files, as_json=as_json)


def _probe(
    suite: ProbeSuite,
    trained: TrainedModel,
    options: SuiteOptions,
    background: Path | None,
    memory_sizes: Sequence[int | None],
    rows: int,
) -> tuple[dict[str, object], str]:
    from byheart.data.probes import Probe, ProbeConfig
    from byheart.evaluation.probes import ProbeProgress, evaluate_probe

    config = ProbeConfig(
        name=suite,
        stories=None if options.stories is None else str(options.stories),
        background=None if background is None else str(background),
        **({} if options.keys is None else {"num_keys": options.keys}),
    )
    try:
        lengths = parse_sizes(options.lengths or _DEFAULT_LENGTHS)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    probe = Probe(config, trained.tokenizer)
    with progress_bar("tokens") as progress:
        bar = Bar(progress)

        def show(now: ProbeProgress) -> None:
            bar.move("evaluate", now.num_tokens, now.total_tokens)

        result = evaluate_probe(
            trained.model,
            probe,
            lengths=lengths,
            memory_sizes=memory_sizes,
            samples=options.samples or _DEFAULT_SAMPLES,
            rows=rows,
            on_progress=show,
        )
    return result.to_dict(), result.to_markdown()


def _harness(
    trained: TrainedModel,
    options: SuiteOptions,
    memory_sizes: Sequence[int | None],
    rows: int,
) -> tuple[dict[str, object], str]:
    # first, because it says what to install
    from byheart.evaluation.harness import evaluate_with_harness, find_tasks

    from lm_eval.utils import make_table  # isort: skip

    assert options.tasks is not None
    results: list[dict[str, Any]] = []
    tables = []
    tasks = [task.strip() for task in options.tasks.split(",")]
    manager = find_tasks(tasks, options.include_path)
    for memory_size in memory_sizes:
        found = evaluate_with_harness(
            trained.model,
            trained.tokenizer,
            tasks,
            num_fewshot=options.few_shot,
            limit=options.limit,
            manager=manager,
            rows=rows,
            memory_size=memory_size,
        )
        size = trained.model.new_state(1, memory_size=memory_size).memory_size
        kept = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples")}
        results.append({"memory_size": size, **kept})
        tables.append(f"Memory size {size:,}\n\n{make_table(found)}")
    return {"measurements": results}, "\n".join(tables)

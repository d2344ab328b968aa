"""`byheart train`."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from byheart.cli.common import (
    Bar,
    FolderAsOption,
    ReadingOptions,
    SkipBadOption,
    SuffixOption,
    TextKeyOption,
    err_console,
    print_json,
    progress_bar,
    reading_options,
    run_kind,
)
from byheart.cli.task import train_task
from byheart.config import apply_overrides, load_config, to_dict
from byheart.recipes import RECIPES, TASK_RECIPES
from byheart.recipes.text import YOUR_MODEL
from byheart.training.config import SHORT_LOSS, RunConfig
from byheart.training.task_config import TaskRunConfig

if TYPE_CHECKING:
    from byheart.training.callbacks import TrainEvent
    from byheart.training.run import TrainResult

ConfigT = TypeVar("ConfigT", RunConfig, TaskRunConfig)

_RECIPE_HELP = (
    "Name of a recipe (see --list), a config.json that a run has written, or FILE.py:FUNCTION."
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train")(train)


def train(
    recipe: Annotated[str, typer.Argument(help=_RECIPE_HELP)] = "",
    *,
    out: Annotated[Path | None, typer.Option(help="Directory of the run.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Documents to learn from: JSON lines, text, or a folder.")
    ] = None,
    validation: Annotated[Path | None, typer.Option(help="Documents to evaluate on.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a pretrained Hugging Face model, for 'attach'.")
    ] = None,
    folder_as: FolderAsOption = None,
    skip_bad: SkipBadOption = False,
    text_key: TextKeyOption = None,
    suffix: SuffixOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field: --set training.max_steps=500. Repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Remove the run that --out holds.")] = False,
    show: Annotated[bool, typer.Option(help="Print the resolved config and stop.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model with memory on long documents or on a task, or resume a run."""
    if list_recipes:
        _list_recipes()
        return
    if resume and overwrite:
        msg = "--resume goes on with the run that --overwrite removes. Choose one."
        raise typer.BadParameter(msg)
    if not recipe:
        msg = f"Name a recipe: {_recipe_names()}; a config.json; or FILE.py:FUNCTION."
        raise typer.BadParameter(msg)
    reading = reading_options(folder_as, skip_bad, text_key, suffix)
    found = find_recipe(recipe)
    if isinstance(found, TaskRunConfig):
        _refuse_documents(data, validation, model, reading)
        task = _override(found, overrides or [])
        directory = out or Path("runs") / task.name
        if show:
            print_json(to_dict(task))
        else:
            train_task(task, directory, resume=resume, overwrite=overwrite, as_json=as_json)
        return
    run = _changed(_with_model(found, model), data, validation, reading, overrides or [])
    if show:
        print_json(to_dict(run))
        return
    directory = out or Path("runs") / run.name
    # brings transformers, which other commands and --help need not wait for
    from byheart.training.run import train as run_training

    with _preparation(run) as on_event:
        result = run_training(run, directory, resume=resume, overwrite=overwrite, on_event=on_event)
    if as_json:
        print_json({**to_dict_of_result(result), "run_dir": str(directory)})
    else:
        _show_result(result, directory)


def _show_result(result: "TrainResult", directory: Path) -> None:
    err_console.print(
        f"Trained {result.num_parameters:,} parameters for {result.steps:,} steps: loss "
        f"{result.loss:.4f} nats per token. The run is in {directory}.",
        highlight=False,
    )
    before, after = (m.get(SHORT_LOSS) for m in (result.evaluation_before, result.evaluation))
    if before is not None and after is not None:
        err_console.print(
            f"Short texts without memory: {before:.4f} nats per token before, {after:.4f} after.",
            highlight=False,
        )
    err_console.print(f"Evaluate it: byheart evaluate {directory}", highlight=False)


def find_recipe(name: str) -> RunConfig | TaskRunConfig:
    """Find a config by a recipe's name, the path of a config file, or FILE.py:FUNCTION.

    Returns:
        The config, of a run on documents or on a task.

    Raises:
        BadParameter: If there is no such recipe.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name in TASK_RECIPES:
        return TASK_RECIPES[name]()
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py") and Path(path).is_file():
        return _from_python(Path(path), function)
    if name.endswith(".json") and Path(name).is_file():
        return _from_json(Path(name))
    msg = (
        f"There is no recipe or file {name!r}. Recipes: {_recipe_names()}; a path must end "
        "in .json, or be FILE.py:FUNCTION."
    )
    raise typer.BadParameter(msg)


def _from_json(path: Path) -> RunConfig | TaskRunConfig:
    if run_kind(path) == "task":
        return load_config(TaskRunConfig, path)
    return load_config(RunConfig, path)


def _from_python(path: Path, function: str) -> RunConfig | TaskRunConfig:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = getattr(module, function, None)
    run = recipe() if callable(recipe) else None
    if not isinstance(run, (RunConfig, TaskRunConfig)):
        msg = f"{path} must have a function {function}() that returns a RunConfig or TaskRunConfig."
        raise typer.BadParameter(msg)
    return run


@contextmanager
def _preparation(run: RunConfig) -> "Iterator[Callable[[TrainEvent], None]]":
    """Show what happens before the first step; then the Trainer has a bar of its own.

    Yields:
        What to pass as `on_event` to `train`.
    """
    with progress_bar("bytes") as progress:
        bar = Bar(progress)

        def show(event: "TrainEvent") -> None:
            if event.kind == "start":
                progress.stop()
            elif event.kind == "tokenize" and event.values["stage"] == "learn":
                err_console.print(
                    f"Learning a BPE of {run.data.bpe_size:,} tokens from {run.data.train} ...",
                    markup=False,
                    highlight=False,
                )
            elif event.kind == "tokenize":
                values = event.values
                done, total = values["num_bytes"], values["total_bytes"]
                bar.move(values["stage"], done, total or done)

        yield show


def _with_model(run: RunConfig, model: Path | None) -> RunConfig:
    """Put a pretrained model and its tokenizer into a run.

    Returns:
        The run.

    Raises:
        BadParameter: If the recipe has no place for it.
    """
    if model is None:
        return run
    if run.pretrained is None:
        msg = f"--model is for recipes with a pretrained model, such as attach, not {run.name!r}."
        raise typer.BadParameter(msg)
    tokenizer = str(model) if run.data.tokenizer == YOUR_MODEL else run.data.tokenizer
    return replace(
        run,
        pretrained=replace(run.pretrained, path=str(model)),
        data=replace(run.data, tokenizer=tokenizer),
    )


def _changed(
    run: RunConfig,
    data: Path | None,
    validation: Path | None,
    reading: ReadingOptions,
    overrides: list[str],
) -> RunConfig:
    if data is not None:
        run = replace(run, data=replace(run.data, train=str(data)))
    if validation is not None:
        run = replace(run, data=replace(run.data, validation=str(validation)))
    run = replace(run, data=replace(run.data, **reading))
    run = _override(run, overrides)
    if run.data.train == "DOCUMENTS":
        msg = f"The recipe {run.name!r} needs documents: pass --data FILE_OR_FOLDER."
        raise typer.BadParameter(msg)
    if run.pretrained is not None and run.pretrained.path == YOUR_MODEL:
        msg = f"The recipe {run.name!r} needs a pretrained model: pass --model FOLDER."
        raise typer.BadParameter(msg)
    return run


def _override(run: ConfigT, overrides: list[str]) -> ConfigT:
    try:
        return apply_overrides(run, overrides)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


def _refuse_documents(
    data: Path | None, validation: Path | None, model: Path | None, reading: ReadingOptions
) -> None:
    if data is not None or validation is not None or model is not None or reading:
        msg = (
            "--data, --validation, --model and the options for reading are for recipes that learn "
            "documents. For the text around the facts of a task: --set task.background=FILE --set "
            "task.validation_background=FILE."
        )
        raise typer.BadParameter(msg)


def to_dict_of_result(result: object) -> dict[str, object]:
    """Turn a training result into JSON-able values.

    Returns:
        Its fields.
    """
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(result).items()  # type: ignore[call-overload]
    }


def _list_recipes() -> None:
    recipes: dict[str, Callable[[], object]] = {**RECIPES, **TASK_RECIPES}
    for name, recipe in recipes.items():
        summary = (recipe.__doc__ or "").splitlines()[0]
        print(f"{name:16} {summary}")


def _recipe_names() -> str:
    return ", ".join([*RECIPES, *TASK_RECIPES])

"""Tasks from the outside: train, evaluate and reproduce with recurrent memory."""

import json
import re
import shutil
import sys

import pytest
import torch

from byheart.cli import reproduce_generalization, reproduce_tasks, task
from byheart.cli.main import main
from byheart.cli.measured import measure_once
from byheart.cli.reproduce_generalization import PUBLISHED_GENERALIZATION
from byheart.cli.reproduce_runs import make_run
from byheart.config import apply_overrides
from byheart.data.tasks import train_task_tokenizer
from byheart.errors import CheckpointError
from byheart.recipes import TASK_RECIPES
from byheart.training.task_files import load_task_run
from byheart.training.task_model import make_task

RUN = [
    "--set=window=29", "--set=encoder.num_layers=1", "--set=encoder.embed_dim=12",
    "--set=encoder.num_heads=2", "--set=encoder.hidden_dim=11", "--set=encoder.vocab_size=1100",
    "--set=memory.num_memory_tokens=3", "--set=curriculum.max_segments=2",
    "--set=curriculum.evaluate_every=3", "--set=curriculum.evaluate_samples=40",
    "--set=curriculum.stage_steps=6", "--set=curriculum.continue_steps=2",
    "--set=training.rows_per_device=3", "--set=training.save_every=2",
    "--set=training.log_every=2", "--set=evaluation.segments=[1, 3]",
    "--set=evaluation.samples=6",
]  # fmt: skip
EASY = "--set=curriculum.advance_accuracy=0.05"


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    for name, text in (
        ("train", "The boat waited near a bridge. Nobody came. "),
        ("validation", "A fox ran along the street. It was late. "),
    ):
        (folder / f"{name}.txt").write_text(text * 20, encoding="utf-8")
    return [
        f"--set=task.background={folder / 'train.txt'}",
        f"--set=task.validation_background={folder / 'validation.txt'}",
    ]


@pytest.fixture(scope="module")
def run_dir(stories, tmp_path_factory):
    """One run for all tests; not to be changed."""
    directory = tmp_path_factory.mktemp("runs") / "mine"
    arguments = ["train", "rmt-memorize", "--out", directory, *RUN, EASY, *stories]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["byheart", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return directory


def test_a_task_is_learned_and_its_table_printed(command, run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    code, out, err = command("train", copy / "config.json", "--out", copy, "--resume")
    assert code == 0, err
    assert "Accuracy of memorize (clean form) by number of segments (6 documents" in out
    assert out.count("\n| ") == 4
    assert "All 2 stages were reached with an accuracy of 5.0%" in err
    assert f"byheart evaluate-task {copy}" in err


def test_a_result_can_be_json(command, run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    code, out, err = command("train", copy / "config.json", "--out", copy, "--resume", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["outcome"], result["run_dir"]) == ("reached", str(copy))
    assert [m["num_segments"] for m in result["evaluation"]["measurements"]] == [1, 3]


def test_a_curriculum_that_fails_is_a_failure_with_a_remedy(command, stories, tmp_path):
    code, out, err = command(
        "train", "rmt-reason", "--out", tmp_path / "run", "--set=encoder.num_local_layers=0",
        *RUN, *stories,
    )  # fmt: skip
    assert code == 1
    assert "reason (clean form)" in out
    assert "The lesson of 1 of 2 segments was not reached: after 6 steps" in err
    assert "Raise curriculum.stage_steps" in err
    # its accuracy at longer documents is no result
    assert "evaluate-task" not in err
    assert (tmp_path / "run" / "model").is_dir()


def test_evaluate_task_measures_several_runs(command, run_dir, tmp_path):
    arguments = ("--segments", "1,2,16", "--samples", 5, "--out", tmp_path)
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    config = json.loads((other / "config.json").read_text())
    config["training"] |= {"seed": 5, "save_every": 7}
    (other / "config.json").write_text(json.dumps(config))
    code, out, err = command("evaluate-task", run_dir, other, *arguments)
    assert code == 0, err
    assert "2 runs" in out
    assert not list(tmp_path.glob("measured-*"))
    result = json.loads((tmp_path / "segments.json").read_text())
    assert result["segments"] == [1, 2, 16]
    assert len(result["accuracy_deviation"]) == 3
    assert [run["measurements"][2]["num_tokens"] for run in result["runs"]] == [5 * 16 * 23] * 2
    assert (tmp_path / "segments.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "segments.md").read_text().startswith("**Accuracy of memorize")


def test_evaluate_task_json_is_the_only_thing_on_standard_output(command, run_dir, tmp_path):
    code, out, err = command(
        "evaluate-task", run_dir, "--segments", "4", "--samples", 3, "--out", tmp_path,
        "--no-plot", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["accuracy_deviation"] is None


@pytest.mark.parametrize(
    ("trained", "instruction", "measured"),
    [
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float32"),
        ("float32", True, "float32"),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_in_it(
    trained, instruction, measured, command, run_dir, tmp_path, monkeypatch
):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["training"]["precision"] = trained
    (copy / "config.json").write_text(json.dumps(config))
    capabilities = {"avx512_bf16": instruction}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    code, out, err = command(
        "evaluate-task", copy, "--segments", "2", "--samples", 3, "--no-plot", "--json"
    )
    assert code == 0, err
    assert [run["precision"] for run in json.loads(out)["runs"]] == [measured]


def test_evaluate_task_reads_other_documents(command, run_dir, tmp_path):
    (tmp_path / "stories.txt").write_text("Wind and rain and nothing else. " * 40)
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    # those of the run need not be there
    config["task"]["validation_background"] = "my/stories"
    (copy / "config.json").write_text(json.dumps(config))
    arguments = ["evaluate-task", copy, "--segments", "2", "--samples", 3, "--no-plot", "--json"]
    other = ["--background", tmp_path / "stories.txt"]
    code, out, err = command(*arguments, *other, "--out", tmp_path / "other")
    assert code == 0, err
    assert json.loads(out)["background"] == str(tmp_path / "stories.txt")
    assert f"Background: {tmp_path / 'stories.txt'}" in (tmp_path / "other/segments.md").read_text()
    code, _, err = command(*arguments, *other)
    assert code == 2
    assert "is not the run's own. Name its directory with --out" in err
    assert not (copy / "evaluation").exists()
    for path, message in (
        (tmp_path / "nothing.txt", "must be an existing file or folder"),
        (config["task"]["background"], "must be documents that the run was not trained on"),
    ):
        code, _, err = command(*arguments, "--background", path, "--out", tmp_path / "none")
        assert code == 1
        assert message in err


@pytest.mark.parametrize("segments", ["0,1", "one", "1,,2"])
def test_lengths_that_are_none_are_wrong_usage(command, run_dir, segments):
    code, _, err = command("evaluate-task", run_dir, "--segments", segments)
    assert code == 2
    assert "must be" in err


def test_a_directory_without_a_finished_run_is_one_clear_line(command, tmp_path):
    code, _, err = command("evaluate-task", tmp_path)
    assert code == 1
    assert "must hold a finished run" in err
    assert "and has no checkpoint to finish it from. Name another." in " ".join(err.split())
    code, _, err = command("evaluate-task", tmp_path / "missing")
    assert code == 1
    assert "but there is no such directory. Check the path." in " ".join(err.split())


def test_reproduce_trains_once_and_compares_with_the_report(command, stories, tmp_path):
    arguments = (
        "reproduce", "memorize", "--quick", "--out", tmp_path, "--seeds", 2, "--segments", "2,3",
        "--samples", 4, *RUN, EASY, *stories,
    )  # fmt: skip
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "| report |" in out
    assert "2 runs" in out
    result = json.loads((tmp_path / "memorize.json").read_text())
    assert result["report"]["4096"] == 0.9056
    assert result["made_by"]["command"].startswith("byheart reproduce memorize --quick --out ")
    assert set(result["made_by"]["versions"]) == {"byheart", "torch", "transformers", "python"}
    assert result["made_by"]["processor"]
    assert all("All 2 stages were reached" in outcome for outcome in result["outcomes"])
    assert (tmp_path / "memorize.png").read_bytes().startswith(b"\x89PNG")
    attention = json.loads((tmp_path / "attention.json").read_text())
    assert set(attention["heads"]) == {"write", "keep", "read"}
    assert [len(labels) for labels in attention["labels"]] == [29] * 4
    assert (tmp_path / "attention-keep.png").read_bytes().startswith(b"\x89PNG")
    assert attention["gates"] is None
    assert not (tmp_path / "attention-gates.png").exists()
    weights = (tmp_path / "seed-1" / "model" / "recurrent_memory.safetensors").read_bytes()
    code, again, err = command(*arguments)
    assert code == 0, err
    assert err.count("is finished.") == 2
    assert again == out
    assert (tmp_path / "seed-1" / "model" / "recurrent_memory.safetensors").read_bytes() == weights
    # a length more costs that length alone: what was measured is as it was, its seconds included
    kept = json.loads((tmp_path / "seed-0" / "segments.json").read_text())["result"]["measurements"]
    code, longer, err = command(*arguments, "--segments", "3,5,2")
    assert code == 0, err
    measured = json.loads((tmp_path / "seed-0" / "segments.json").read_text())["result"]
    assert [entry["num_segments"] for entry in measured["measurements"]] == [2, 3, 5]
    assert measured["measurements"][:2] == kept
    assert longer.index("| 2 |") < longer.index("| 3 |") < longer.index("| 5 |")
    # and so does another number of documents
    code, _, err = command(*arguments, "--samples", 5, "--segments", "2")
    assert code == 0, err
    code, after, err = command(*arguments, "--segments", "3,5,2,2")
    assert (code, after) == (0, longer), err


def test_a_finished_run_needs_no_checkpoints_and_is_not_overwritten(command, stories, tmp_path):
    arguments = (
        "reproduce", "memorize", "--quick", "--out", tmp_path, "--segments", "2",
        "--samples", 4, "--no-plot", *RUN, EASY, *stories,
    )  # fmt: skip
    code, out, err = command(*arguments, "--seeds", 2)
    assert code == 0, err
    weights = (tmp_path / "seed-1" / "model" / "recurrent_memory.safetensors").read_bytes()
    for checkpoint in tmp_path.glob("seed-*/checkpoint-*"):
        shutil.rmtree(checkpoint)
    # what is measured needs no model
    shutil.rmtree(tmp_path / "seed-1" / "model")
    code, again, err = command(*arguments, "--seeds", 2)
    assert (code, again) == (0, out), err
    code, _, err = command(*arguments, "--seeds", 2, "--segments", "7")
    assert code == 1
    assert "must hold a finished run with model/" in " ".join(err.split())
    code, _, err = command(*arguments, "--set", "training.learning_rate=1e-4")
    assert code == 1
    assert "it holds a finished run with others" in " ".join(err.split())
    # a run that is not there is trained, and its model is the same
    shutil.rmtree(tmp_path / "seed-1")
    code, _, err = command(*arguments, "--seeds", 2)
    assert code == 0, err
    assert (tmp_path / "seed-1" / "model" / "recurrent_memory.safetensors").read_bytes() == weights


def test_generalization_measures_every_stage_and_goes_on_by_itself(command, stories, tmp_path):
    changes = [*RUN, EASY, *stories, "--set=task.more_stories=false"]
    arguments = (
        "reproduce", "generalization", "--task", "detect", "--quick", "--out", tmp_path,
        "--seeds", 2, "--segments", "1,2,3", "--samples", 4, *changes,
    )  # fmt: skip
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "| 1 | 2 runs |" in out
    assert "|  | report | 100.0 | 100.0 | 99.7 |" in out
    result = json.loads((tmp_path / "detect.json").read_text())
    assert [stage["trained_on"] for stage in result["stages"]] == [1, 2]
    assert result["segments"] == [1, 2, 3]
    assert result["report"]["2"]["15"] == 0.275
    assert (tmp_path / "detect.png").read_bytes().startswith(b"\x89PNG")
    # a killed command finds the models that were measured, and measures the others
    (tmp_path / "detect" / "seed-1" / "segments-stage-2.json").unlink()
    kept = tmp_path / "detect" / "seed-0" / "segments-stage-1.json"
    before = kept.read_bytes()
    code, again, err = command(*arguments)
    assert code == 0, err
    assert err.count("is finished.") == 2
    assert again == out
    assert kept.read_bytes() == before
    # the same runs serve the figure of long documents
    code, out, err = command(
        "reproduce", "detect", "--quick", "--out", tmp_path / "detect", "--seeds", 2,
        "--segments", "1,2", "--samples", 4, "--no-plot", *changes,
    )  # fmt: skip
    assert code == 0, err
    assert err.count("Going on with") == 2
    assert (tmp_path / "detect" / "seed-0" / "stages" / "2").is_dir()


def test_generalization_without_any_stage_is_a_failure_with_a_remedy(command, stories, tmp_path):
    code, out, err = command(
        "reproduce", "generalization", "--quick", "--out", tmp_path, *RUN, *stories
    )
    assert code == 1
    assert not out
    assert "At least one stage must be reached to be measured. The stage of 1 of 2" in err


def test_the_report_has_seven_stages_measured_on_fifteen_lengths():
    assert set(PUBLISHED_GENERALIZATION) == {"memorize", "detect", "reason"}
    for stages in PUBLISHED_GENERALIZATION.values():
        assert list(stages) == list(range(1, 8))
        for stage, row in stages.items():
            assert list(row) == list(range(1, 16))
            # every model has learned the length of its stage
            assert 0.96 < row[stage] <= 1
            assert min(row.values()) > 0.15


def test_a_task_that_was_not_learned_is_a_failure_beside_its_table(command, stories, tmp_path):
    changes = [*RUN, *stories, "--set=curriculum.advance_accuracy=0.3"]
    changes += ["--set=curriculum.max_segments=4", "--set=curriculum.continue_segments=4"]
    arguments = (
        "reproduce", "memorize", "--quick", "--out", tmp_path, "--segments", "1,2", "--samples", 4,
        "--no-plot", *changes,
    )  # fmt: skip
    for _ in range(2):
        code, out, err = command(*arguments)
        assert code == 1, err
        assert re.search(r"seed-0: The stage of \d of 4 segments was not reached", out)
        assert "was not reached" in (tmp_path / "memorize.md").read_text()


def test_quick_and_full_runs_have_directories_of_their_own(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for module in (reproduce_tasks, reproduce_generalization):
        monkeypatch.setattr(module, "prepare_output", lambda path: found.append(str(path)) or 1 / 0)
    for arguments in (("memorize",), ("generalization",)):
        for quick in ((), ("--quick",)):
            with pytest.raises(ZeroDivisionError):
                command("reproduce", *arguments, *quick)
    assert found == [
        "reproduce/memorize", "reproduce/memorize-quick",
        "reproduce/generalization", "reproduce/generalization-quick",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["memorize", "detect", "reason"])
def test_quick_runs_can_be_longer(name):
    assert make_run(name, quick=True, overrides=None).curriculum.max_segments == 4
    longer = make_run(name, quick=True, overrides=["curriculum.max_segments=7"]).curriculum
    assert (longer.max_segments, longer.continue_steps) == (7, 200)
    later = TASK_RECIPES[f"rmt-{name}"]().curriculum.continue_segments
    assert longer.continue_segments == later


def test_reproduce_overwrites_no_model(command, run_dir, tmp_path):
    directory = tmp_path / "seed-0"
    shutil.copytree(run_dir, directory)
    (directory / "result.json").unlink()
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    code, _, err = command("reproduce", "detect", "--quick", "--out", tmp_path)
    assert code == 1
    assert "it holds the model of a run that left neither result nor checkpoints" in err
    assert (directory / "model" / "manifest.json").read_bytes() == (
        run_dir / "model" / "manifest.json"
    ).read_bytes()


def test_a_run_that_goes_on_is_not_measured_as_it_was(command, run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    # as resuming with more steps leaves it until the run is finished again
    (copy / "result.json").unlink()
    code, _, err = command("evaluate-task", copy, "--segments", "1")
    assert code == 1
    assert "Finish it with resume=True (--resume)" in " ".join(err.split())


def test_training_and_evaluation_have_different_documents(command, stories, tmp_path):
    same = stories[0].partition("background=")[2]
    code, _, err = command(
        "train", "rmt-memorize", "--out", tmp_path / "run", *RUN,
        f"--set=task.background={same}", f"--set=task.validation_background={same}",
    )  # fmt: skip
    assert code == 2
    assert "validation_background must be other documents than background" in err
    assert not (tmp_path / "run").exists()


def test_a_pretrained_encoder_that_is_not_there_is_named(command, tmp_path):
    code, _, err = command(
        "train", "rmt-memorize", "--out", tmp_path / "run", "--set=pretrained=nowhere",
        "--set=encoder=null", "--set=window=512",
    )  # fmt: skip
    assert code == 1
    assert "pretrained must be a folder as save_pretrained leaves it" in err
    assert not (tmp_path / "run").exists()


def test_sixteen_facts_need_what_the_recipe_says():
    words = " ".join(TASK_RECIPES["rmt-capacity"].__doc__.split())
    settings = re.findall(r"--set ([\w.]+=[\w\[\],]+)", words)
    run = apply_overrides(TASK_RECIPES["rmt-capacity"](), settings)
    assert run.task.num_facts == 16
    tokenizer = train_task_tokenizer(
        run.task.resolve(run.segment_length, "train"), run.encoder.vocab_size
    )
    least = make_task(run, tokenizer, is_training=True).min_segments
    assert least <= min(run.curriculum.min_segments, *run.evaluation.segments)


def test_quick_changes_the_recipe_before_the_user_does(command, tmp_path):
    code, _, err = command("reproduce", "reason", "--quick", "--set", "window=5")
    assert code == 2
    assert "window must be at least 14" in err


def test_task_recipes_are_listed_and_shown(command):
    code, out, _ = command("train", "--list")
    assert code == 0
    assert "rmt-capacity" in out
    code, out, _ = command("train", "rmt-memorize", "--set", "task.form=report", "--show")
    assert json.loads(out)["task"]["form"] == "report"
    # what the recipe has and the report has not is taken back by name
    changes = ["task.form=report", "task.background=a", "task.validation_background=b"]
    back = {
        "more_stories": "task.more_stories=false", "namesakes": "task.namesakes=0",
        "burn_in_segments": "curriculum.burn_in_segments=0",
    }  # fmt: skip
    options = [f"--set={change}" for change in (*changes, *back.values())]
    code, out, err = command("train", "rmt-detect", *options, "--show")
    assert code == 0, err
    for field, change in back.items():
        code, _, err = command(
            "train", "rmt-detect", *(o for o in options if change not in o), "--show"
        )
        assert code == 2
        assert field in err


@pytest.mark.parametrize("option", ["--data", "--validation", "--suffix"])
def test_options_for_documents_are_refused_for_tasks(command, tmp_path, option):
    code, _, err = command("train", "rmt-detect", option, tmp_path, "--show")
    assert code == 2
    assert "--set task.background=FILE" in err


def test_a_wrong_setting_is_wrong_usage(command):
    code, _, err = command("train", "rmt-detect", "--set", "curriculum.stages=3", "--show")
    assert code == 2
    assert "curriculum.stages is not a known setting" in err


def test_a_task_recipe_can_be_a_function_in_a_file(command, tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text("from byheart.recipes.tasks import rmt_detect\n")
    code, out, err = command("train", f"{recipe}:rmt_detect", "--show")
    assert code == 0, err
    assert json.loads(out)["name"] == "rmt-detect"


def test_every_run_and_the_place_for_results_are_looked_at_before_anything_is_measured(
    command, run_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("byheart.cli.task.measure_run", pytest.fail)
    code, _, err = command("evaluate-task", run_dir, tmp_path, "--out", tmp_path / "out")
    assert code == 1
    assert f"{tmp_path} must hold a finished run" in err
    (tmp_path / "file").write_text("not a folder")
    code, _, err = command("evaluate-task", run_dir, "--out", tmp_path / "file" / "out")
    assert code == 2
    assert "one that can be written to" in err


def test_documents_of_a_run_that_are_not_there_are_named_with_their_source(
    command, run_dir, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["task"]["validation_background"] = "my/stories"
    (copy / "config.json").write_text(json.dumps(config))
    code, _, err = command("evaluate-task", copy, "--segments", "1")
    assert code == 1
    assert f"must be where {copy / 'config.json'} says, my/stories, and are not there" in err


def test_each_kind_of_run_names_the_command_that_measures_it(command, run_dir, tmp_path):
    for name in ("evaluate", "generate"):
        code, _, err = command(name, run_dir)
        assert code == 1
        assert f"has learned a task. Measure it with: byheart evaluate-task {run_dir}" in err
    (tmp_path / "config.json").write_text('{"name": "mine", "model": {}}')
    code, _, err = command("evaluate-task", tmp_path)
    assert code == 1
    assert f"has learned documents. Measure it with: byheart evaluate {tmp_path}" in err


def test_several_runs_need_a_directory_of_their_own(command, run_dir, tmp_path):
    code, _, err = command("evaluate-task", run_dir, run_dir, "--segments", "1")
    assert code == 2
    assert "belongs to none of them. Name its directory with --out" in err


def changed(run_dir, copy, **task):
    """Copy a run and change what it says to have learned."""
    shutil.copytree(run_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["task"] |= task
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_lengths_that_cannot_hold_all_facts_are_left_out_or_refused_first(
    command, run_dir, tmp_path, monkeypatch
):
    capacity = changed(run_dir, tmp_path / "capacity", name="capacity", num_facts=5)
    least = load_task_run(capacity).task.min_segments
    assert 1 < least < 16
    monkeypatch.setattr(task, "DEFAULT_SEGMENTS", "1,2,16,32")
    code, out, err = command("evaluate-task", capacity, "--samples", 2, "--no-plot", "--json")
    assert code == 0, err
    table = (capacity / "evaluation" / "segments.md").read_text()
    assert table.startswith("**Accuracy of capacity (clean form, 5 facts) by number of segments")
    assert json.loads(out)["segments"] == [n for n in (1, 2, 16, 32) if n >= least]
    monkeypatch.setattr(task, "measure_trained", pytest.fail)
    place = tmp_path / "out"
    code, _, err = command("evaluate-task", capacity, "--segments", "16,1", "--out", place)
    assert code == 2
    assert f"--segments must be at least the {least} that hold all facts, got 1. Leave" in err
    assert not place.exists()


@pytest.mark.parametrize("other", [{"name": "detect"}, {"form": "report"}])
def test_runs_of_different_tasks_are_told_apart_before_they_are_measured(
    command, run_dir, tmp_path, monkeypatch, other
):
    copy = changed(run_dir, tmp_path / "copy", **other)
    monkeypatch.setattr(task, "measure_trained", pytest.fail)
    place = tmp_path / "out"
    code, _, err = command("evaluate-task", run_dir, copy, "--segments", "1", "--out", place)
    assert code == 2
    assert "must have learned the same task in segments of the same length, got memorize" in err
    assert f"in {run_dir} and " in err
    assert not place.exists()


@pytest.mark.parametrize("other", [{"fragments": 0.0}, None])
def test_runs_that_differ_in_more_than_their_seed_are_not_averaged(
    command, run_dir, tmp_path, monkeypatch, other
):
    copy = run_dir / ".." / run_dir.name
    if other is not None:
        copy = changed(run_dir, tmp_path / "copy", **other)
    monkeypatch.setattr(task, "measure_trained", pytest.fail)
    place = tmp_path / "out"
    code, _, err = command("evaluate-task", run_dir, copy, "--segments", "1", "--out", place)
    assert code == 2
    lines = " ".join(err.split())
    if other is None:
        assert f"Each run must be named once, got {run_dir} twice. Leave one out." in lines
    else:
        assert f"differ in their seed alone, but the config.json of {run_dir} and {copy}" in lines
    assert not place.exists()


def test_what_was_measured_before_an_interruption_is_not_measured_again(
    command, run_dir, tmp_path, monkeypatch
):
    measure, lengths, failing = task.measure_trained, [], [4]

    def interrupted(trained, segments, **options):
        lengths.append(*segments)
        if segments[0] in failing:
            raise KeyboardInterrupt
        return measure(trained, segments, **options)

    monkeypatch.setattr(task, "measure_trained", interrupted)
    arguments = ("evaluate-task", run_dir, "--segments", "4,1,2", "--samples", 3, "--no-plot")
    code, _, err = command(*arguments, "--out", tmp_path)
    assert code == 130, err
    failing.clear()
    code, out, err = command(*arguments, "--out", tmp_path)
    assert code == 0, err
    assert lengths == [1, 2, 4, 4]
    assert out.index("| 1 |") < out.index("| 2 |") < out.index("| 4 |")
    assert not list(tmp_path.glob("measured-*"))
    # a result that is there says nothing about the next one
    code, _, err = command(*arguments, "--out", tmp_path)
    assert (code, lengths) == (0, [1, 2, 4, 4, 1, 2, 4]), err


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", None])
def test_a_damaged_config_is_not_taken_for_that_of_documents(command, run_dir, tmp_path, content):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_text(content)
    code, _, err = command("evaluate-task", copy, "--segments", "1")
    assert code == 1
    assert f"{copy / 'config.json'} must hold the settings of a run" in err
    assert "has learned documents" not in err


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"settings": {}, "result": {"task": "mem', '{"settings": {}, "result": {}}',
     '{"settings": {}, "result": {"measurements": {}}}'],
)  # fmt: skip
def test_damaged_measurements_are_named(tmp_path, content):
    file = tmp_path / "segments.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=r"segments\.json must hold what was measured before"):
        measure_once(file, {"model_fingerprint": ""}, (1,), pytest.fail)
    assert file.read_text() == content


@pytest.mark.parametrize("setting", ["training.seed=7", "training.seed=0", 'training={"seed": 7}'])
def test_reproduce_has_seeds_of_its_own(command, tmp_path, setting):
    for figure in ("memorize", "generalization"):
        code, _, err = command("reproduce", figure, "--out", tmp_path / "out", "--set", setting)
        assert code == 2
        assert "training.seed must not be set here" in err
        assert "Use --seeds" in err
    assert not (tmp_path / "out").exists()

"""What is refused is refused before anything in the directory of a run has changed."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from task_setup import task_part, task_run
from training_setup import run_config
from transformers import GPT2Config, GPT2LMHeadModel

from byheart.adapters.attach_config import AttachConfig
from byheart.errors import CheckpointError
from byheart.memory.config import KnnMemoryConfig
from byheart.training.config import EvaluationConfig, PretrainedConfig
from byheart.training.run import train
from byheart.training.task_run import train_task


@pytest.fixture(scope="module")
def document_run(tmp_path_factory) -> Path:
    """A finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("documents")
    train(run_config(folder, max_steps=2), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def finished_task(tmp_path_factory) -> Path:
    """A finished run that has learned a task; not to be changed."""
    out = tmp_path_factory.mktemp("task") / "run"
    train_task(task_run(), out)
    return out


def files_of(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def require_refused(train_run, run, finished: Path, tmp_path: Path, error, message: str) -> None:
    """Refused over a run, of which nothing changes, and where nothing is: nothing comes."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = files_of(out)
    with pytest.raises(error, match=message):
        train_run(run, out, overwrite=True)
    assert files_of(out) == before
    with pytest.raises(error, match=message):
        train_run(run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_memory_in_layers_that_are_not_there_costs_no_run(document_run, attached_run, tmp_path):
    memory = replace(attached_run.pretrained.memory, knn=KnnMemoryConfig(layers=(7,), top_k=4))
    run = replace(attached_run, pretrained=replace(attached_run.pretrained, memory=memory))
    require_refused(train, run, document_run, tmp_path, ValueError, "knn.layers must be")


def test_an_evaluation_that_cannot_be_done_costs_no_run(document_run, tmp_path):
    run = run_config(document_run.parent, model={"knn_memory": None})
    run = replace(run, evaluation=EvaluationConfig(memory_sizes=(5,)))
    message = "without kNN memory can only be measured with"
    require_refused(train, run, document_run, tmp_path, ValueError, message)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_beyond_the_positions_of_a_model_cost_no_run(document_run, tmp_path, split):
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=12, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "long.txt").write_text("No end is in sight. " * 9)
    (tmp_path / "short.txt").write_text("It ends here.")
    memory = AttachConfig(segment_length=7, xl_cache_length=7)
    run = run_config(document_run.parent, max_steps=2)
    texts = dict.fromkeys(("train", "validation"), str(tmp_path / "short.txt"))
    run = replace(
        run,
        model=None,
        pretrained=PretrainedConfig(path=str(tmp_path / "gpt2"), memory=memory),
        data=replace(run.data, **texts | {split: str(tmp_path / "long.txt")}),
    )
    remedy = {"train": "data.max_document_tokens", "validation": "evaluation.max_tokens"}[split]
    require_refused(train, run, document_run, tmp_path, ValueError, remedy)


def test_an_encoder_that_cannot_be_used_costs_no_run(finished_task, pretrained, tmp_path):
    run = task_run(encoder=None, pretrained=str(pretrained), window=41)
    message = "must fit into the window of 40 positions, got 41"
    require_refused(train_task, run, finished_task, tmp_path, ValueError, message)


def test_facts_that_do_not_fit_cost_no_run(finished_task, tmp_path):
    run = task_run(task=task_part(name="capacity", num_facts=9))
    message = r"curriculum.min_segments must be at least the \d that hold"
    require_refused(train_task, run, finished_task, tmp_path, ValueError, message)


@pytest.mark.parametrize("kind", ["documents", "task"])
def test_a_place_that_cannot_be_written_to_is_no_run_to_go_on_with(tmp_path, monkeypatch, kind):
    train_run, run = (
        (train_task, task_run()) if kind == "task" else (train, run_config(tmp_path, max_steps=2))
    )
    out, make = tmp_path / "out", Path.mkdir

    def refuse(path: Path, *arguments, **options) -> None:
        if path == out:
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"could not be written: .*Permission denied") as met:
        train_run(run, out)
    assert str(met.value).endswith("may be written to, or choose another directory (--out).")
    assert "resume" not in str(met.value)

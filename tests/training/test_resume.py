"""Checkpoints: exact resume, refusals, rotation, and a disk that is full."""

import errno
import json
import logging
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training_setup import Documents, make_dataset, make_trainer, metrics_of, training_config

from byheart.data.rows import SegmentDataset
from byheart.errors import CheckpointError
from byheart.memory.config import KnnMemoryConfig
from byheart.models.checkpoint import load_model
from byheart.models.fingerprint import model_fingerprint
from byheart.training import trainer as trainer_module
from byheart.training.checkpoint import complete_checkpoint, differences, find_checkpoint
from byheart.training.metrics import MetricsFile
from byheart.training.stop import StopSignals, TrainingInterruptedError

# 5 and 3 do not divide each other: a log line spans a checkpoint
CONFIG = training_config(max_steps=11, save_every=3, log_every=5)
MODEL = {"dropout": 0.2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never interrupted; not to be changed."""
    out = tmp_path_factory.mktemp("whole")
    make_trainer(out, CONFIG, model=MODEL).train()
    return out


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it, with the checkpoints of steps 9 and 11."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    return out


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, run):
    shutil.rmtree(run / "checkpoint-11")
    trainer = make_trainer(run, CONFIG, model=MODEL)
    trainer.train(find_checkpoint(run))
    assert metrics_of(run) == metrics_of(whole)
    first, second = (load_model(path / "checkpoint-11" / "model") for path in (whole, run))
    assert model_fingerprint(first) == model_fingerprint(second)
    memories = [
        safetensors.torch.load_file(path / "checkpoint-11" / "memory_rank0.safetensors")
        for path in (whole, run)
    ]
    assert memories[0].keys() == memories[1].keys()
    for name, tensor in memories[0].items():
        torch.testing.assert_close(memories[1][name], tensor, atol=0, rtol=0)


def _knn(**changes) -> dict:
    settings = {"layers": (1,), "memory_size": 24, "top_k": 4} | changes
    return {"knn_memory": KnnMemoryConfig(**settings)}


@pytest.mark.parametrize(
    ("model", "training"),
    [
        (_knn(dtype="bfloat16"), {"precision": "bfloat16"}),
        (_knn(layers=(0, 1)), {"accumulation_steps": 2}),
        (_knn(combine="joint", write="evicted"), {}),
        (_knn(search="strided_bucket") | {"empty_slots": "zeros"}, {}),
        ({"knn_memory": None, "xl_cache_length": 0}, {}),
    ],
)
def test_every_kind_of_memory_is_resumed_exactly(tmp_path, model, training):
    config = training_config(max_steps=7, log_every=2, save_every=3, **training)
    make_trainer(tmp_path / "whole", config, model=MODEL | model).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-7")
    make_trainer(tmp_path / "run", config, model=MODEL | model).train(
        find_checkpoint(tmp_path / "run")
    )
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_without_its_memory_the_resumed_run_would_be_another(whole, run, monkeypatch):
    shutil.rmtree(run / "checkpoint-11")
    load = trainer_module.load_memory

    def forget(path, empty, process):
        fresh = [state.fork() for state in empty]
        return fresh, load(path, empty, process)[1]

    monkeypatch.setattr(trainer_module, "load_memory", forget)
    make_trainer(run, CONFIG, model=MODEL).train(find_checkpoint(run))
    assert metrics_of(run)[0] == metrics_of(whole)[0]
    assert metrics_of(run)[-1] != metrics_of(whole)[-1]


def test_rows_that_stand_elsewhere_than_the_schedule_says_are_refused(run):
    checkpoint = find_checkpoint(run)
    complete_checkpoint(checkpoint.path, checkpoint.identity, checkpoint.positions()[::-1])
    with pytest.raises(CheckpointError, match="rows that read other segments than the schedule"):
        make_trainer(run, CONFIG, model=MODEL).train(checkpoint)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_can_go_on(whole, tmp_path, number):
    def stop_after_the_first_line(event):
        if event.kind == "log" and event.step == 5:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    trainer = make_trainer(tmp_path, CONFIG, model=MODEL, on_event=stop_after_the_first_line)
    with pytest.raises(
        TrainingInterruptedError,
        match=f"stopped by {number.name} after step 6; .*checkpoint-6 is complete. Continue with",
    ):
        trainer.train()
    assert signal.getsignal(number) is before
    make_trainer(tmp_path, CONFIG, model=MODEL).train(find_checkpoint(tmp_path))
    assert metrics_of(tmp_path) == metrics_of(whole)


def test_signals_are_left_alone_outside_the_main_thread():
    before = signal.getsignal(signal.SIGINT)

    def use() -> None:
        with StopSignals():
            handlers.append(signal.getsignal(signal.SIGINT))

    handlers = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_second_interrupt_stops_at_once(tmp_path):
    def interrupt_twice(event):
        if event.kind == "log":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    trainer = make_trainer(tmp_path, CONFIG, on_event=interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_skipped_segments_are_not_read(run, monkeypatch):
    shutil.rmtree(run / "checkpoint-11")
    read = []
    get_item = SegmentDataset.__getitem__

    def record(dataset: SegmentDataset, index: int) -> dict[str, torch.Tensor]:
        read.append(index)
        return get_item(dataset, index)

    trainer = make_trainer(run, CONFIG, model=MODEL)
    monkeypatch.setattr(SegmentDataset, "__getitem__", record)
    trainer.train(find_checkpoint(run))
    assert read == list(range(2 * 9, 2 * 11))


def test_old_checkpoints_leave_when_a_new_one_is_complete(run):
    assert steps_of(run) == [9, 11]


def test_rotation_keeps_what_is_asked_for_and_removes_what_was_cut_short(tmp_path):
    config = training_config(max_steps=9, save_every=2, keep_checkpoints=3)
    (tmp_path / "checkpoint-1").mkdir()
    make_trainer(tmp_path, config).train()
    assert steps_of(tmp_path) == [6, 8, 9]


def test_damaged_checkpoints_do_not_take_the_place_of_good_ones(run):
    _flipped(run / "checkpoint-11")
    shutil.copytree(run / "checkpoint-11", run / "checkpoint-10")
    config = training_config(max_steps=12, save_every=3, log_every=5)
    seen = []

    def look(event):
        if event.kind == "checkpoint":
            seen.append(steps_of(run))

    make_trainer(run, config, model=MODEL, on_event=look).train(find_checkpoint(run))
    assert seen == [[9, 12]]


def test_only_failed_writes_are_explained_as_such(tmp_path, monkeypatch):
    def lack_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("byheart.training.checkpoint.save_file", lack_memory)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\.$"):
        make_trainer(tmp_path, CONFIG).train()
    assert steps_of(tmp_path) == []


def test_memory_is_read_on_the_cpu(run, monkeypatch):
    asked = []

    def load(file, device="cpu"):
        asked.append(device)
        return safetensors.torch.load_file(file)

    monkeypatch.setattr("byheart.training.checkpoint.load_file", load)
    make_trainer(run, CONFIG, model=MODEL).train(find_checkpoint(run))
    assert asked == ["cpu"]


def _cut_short(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "it has no manifest.json"


def _truncated(path: Path) -> str:
    file = path / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])
    return "optimizer.pt must have .* bytes"


def _flipped(path: Path) -> str:
    file = path / "memory_rank0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "was changed after it was saved"


def _empty_manifest(path: Path) -> str:
    (path / "manifest.json").write_text("")
    return "is not a manifest that byheart wrote"


def _other_format(path: Path) -> str:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    return "found byheart-training-checkpoint of version 99"


DAMAGES = [_cut_short, _truncated, _flipped, _empty_manifest, _other_format]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_its_predecessor_used(run, caplog, damage):
    reason = damage(run / "checkpoint-11")
    with caplog.at_level(logging.WARNING):
        checkpoint = find_checkpoint(run)
    assert (checkpoint.step, checkpoint.path) == (9, run / "checkpoint-9")
    assert "Checkpoint checkpoint-11 is not used" in caplog.text
    damage(run / "checkpoint-9")
    with pytest.raises(CheckpointError, match=reason):
        find_checkpoint(run)


def test_without_any_checkpoint_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold a complete checkpoint\. There is none"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_cut_short_earlier_is_written_anew(whole, run):
    _cut_short(run / "checkpoint-11")
    (run / "checkpoint-11" / "stray").write_text("left by a killed process")
    make_trainer(run, CONFIG, model=MODEL).train(find_checkpoint(run))
    assert find_checkpoint(run).step == 11
    assert not (run / "checkpoint-11" / "stray").exists()
    assert metrics_of(run) == metrics_of(whole)


@pytest.mark.parametrize(
    ("model", "training", "options", "message"),
    [
        ({"hidden_dim": 17}, {}, {}, "model.hidden_dim 13, this run has 17"),
        (
            {"knn_memory": KnnMemoryConfig(layers=(1,), memory_size=29, top_k=4)},
            {},
            {},
            "model.knn_memory.memory_size 23, this run has 29. Resume with what",
        ),
        ({"knn_memory": None}, {}, {}, r"model.knn_memory \{.*\}, this run has null"),
        ({}, {"learning_rate": 0.5}, {}, "training.learning_rate 0.003, this run has 0.5"),
        (
            {},
            {"rows_per_device": 1, "accumulation_steps": 2},
            {},
            "rows_per_device 2, this run has 1; training.accumulation_steps 1, this run has 2",
        ),
        ({}, {}, {"tokenizer_fingerprint": "b" * 64}, 'tokenizer "", this run has bbbbbbbbbbbb[.]'),
        ({}, {}, {"dataset": Documents(seed=1)}, 'documents "documents 0 .*"documents 1 '),
        ({}, {}, {"dataset": Documents((9, 50))}, "; schedule [0-9a-f]{12}, this run has "),
    ],
)
def test_checkpoint_of_another_run_is_refused_before_anything_changes(
    run, model, training, options, message
):
    config = training_config(**({"max_steps": 11, "log_every": 5} | training))
    if "dataset" in options:
        options = {"dataset": make_dataset(config, options["dataset"])}
    trainer = make_trainer(run, config, model=MODEL | model, **options)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    weights = model_fingerprint(trainer.trained)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(find_checkpoint(run))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert model_fingerprint(trainer.trained) == weights
    assert trainer.memory == []


def test_a_run_may_be_prolonged_and_save_and_log_at_other_steps(run):
    config = training_config(max_steps=14, save_every=13, log_every=2)
    make_trainer(run, config, model=MODEL).train(find_checkpoint(run))
    assert [line["step"] for line in metrics_of(run)] == [5, 10, 11, 12, 14]
    assert steps_of(run) == [13, 14]


def test_differences_are_named_by_their_path():
    saved = {"a": 1, "b": {"c": [2], "d": None}}
    mine = {"a": 1, "b": {"c": [3], "d": {"e": 4}}, "f": 5}
    assert differences(saved, mine) == [
        ("b.c", [2], [3]), ("b.d", None, {"e": 4}), ("f", None, 5)
    ]  # fmt: skip
    assert differences(saved, saved) == []


def _no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "target",
    [
        "byheart.models.checkpoint.save_file",
        "byheart.training.checkpoint.save_file",
        "byheart.training.checkpoint.write_manifest",
        "torch.save",
    ],
)
def test_full_disk_is_one_clear_error_and_leaves_the_previous_checkpoint(
    tmp_path, monkeypatch, target
):
    def fill_the_disk(event):
        if event.kind == "checkpoint" and event.step == 3:
            monkeypatch.setattr(target, _no_space)

    trainer = make_trainer(tmp_path, CONFIG, model=MODEL, on_event=fill_the_disk)
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint-6 could not be written: .*No space left on device.*"
        r"See that the disk has room \(.* MB free\) .*; then go on .* with resume=True",
    ):
        trainer.train()
    assert steps_of(tmp_path) == [3]
    monkeypatch.undo()
    assert find_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize("file", ["model/model.safetensors", "optimizer.pt"])
def test_file_that_cannot_grow_is_the_same_clear_error(whole, tmp_path, file):
    size = (whole / "checkpoint-9" / file).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit_files(event):
        if event.kind == "checkpoint" and event.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))

    trainer = make_trainer(tmp_path, CONFIG, model=MODEL, on_event=limit_files)
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written: .*MB free"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_of(tmp_path) == [3]
    make_trainer(tmp_path, CONFIG, model=MODEL).train(find_checkpoint(tmp_path))
    assert metrics_of(tmp_path) == metrics_of(whole)


def test_full_disk_while_logging_names_the_metrics_file(tmp_path, monkeypatch):
    monkeypatch.setattr(MetricsFile, "append", _no_space)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl could not be written: .*No space"):
        make_trainer(tmp_path, CONFIG).train()


def test_line_cut_short_by_a_kill_is_dropped(whole, run):
    shutil.rmtree(run / "checkpoint-11")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    make_trainer(run, CONFIG, model=MODEL).train(find_checkpoint(run))
    assert metrics_of(run) == metrics_of(whole)

"""The trainer against a plain loop, and the laws of rows, memory and evaluation."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from training_setup import (
    Documents,
    losses,
    make_dataset,
    make_trainer,
    metrics_of,
    training_config,
)
from transformers.optimization import get_scheduler

from byheart.data.rows import RowPlan, SegmentDataset, collate
from byheart.memory.state import MemoryState
from byheart.models.decoder import Decoder
from byheart.models.fingerprint import model_fingerprint
from byheart.training import arguments as arguments_module
from byheart.training.callbacks import TensorboardCallback
from byheart.training.checkpoint import find_checkpoint
from byheart.training.optim import make_optimizer, schedule_arguments
from byheart.training.wrapper import TrainedModel


def test_trainer_equals_a_plain_loop(tmp_path):
    config = training_config(rows_per_device=3, save_every=100)
    trainer = make_trainer(tmp_path, config)
    torch.manual_seed(config.seed)
    decoder = Decoder(trainer.trained.config)
    optimizer = make_optimizer(decoder, config)
    schedule = schedule_arguments(config)
    scheduler = get_scheduler(
        schedule["lr_scheduler_type"], optimizer, config.warmup_steps, config.max_steps,
        schedule["lr_scheduler_kwargs"],
    )  # fmt: skip
    dataset = make_dataset(config)
    state = decoder.new_state(3)
    expected, norms = [], []
    for step in range(config.max_steps):
        batch = collate([dataset[step * 3 + row] for row in range(3)])
        out = TrainedModel(decoder)(**batch, state=state)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), config.max_gradient_norm)
        norms.append(norm.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        state = state.commit(out.new_entries)
        expected.append(out.loss.item())

    trainer.train()
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-6)
    assert [line["gradient_norm"] for line in metrics_of(tmp_path)] == pytest.approx(norms)
    assert max(norms) > config.max_gradient_norm
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(trainer.trained.get_parameter(name), parameter)
    torch.testing.assert_close(trainer.memory[0].position, state.position)
    torch.testing.assert_close(trainer.memory[0].stores[1].keys, state.stores[1].keys)


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    whole = training_config(rows_per_device=6)
    parts = training_config(rows_per_device=2, accumulation_steps=3)
    results = []
    for name, config in (("whole", whole), ("parts", parts)):
        trainer = make_trainer(tmp_path / name, config)
        trainer.train()
        results.append((losses(tmp_path / name), trainer))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, parameter in results[0][1].trained.named_parameters():
        torch.testing.assert_close(
            results[1][1].trained.get_parameter(name), parameter, atol=1e-5, rtol=1e-5
        )
    rows = torch.cat([state.position for state in results[1][1].memory])
    torch.testing.assert_close(rows, results[0][1].memory[0].position)


def test_memory_is_committed_once_per_micro_batch_and_after_backward(tmp_path, monkeypatch):
    config = training_config(rows_per_device=2, accumulation_steps=3, max_steps=5)
    trainer = make_trainer(tmp_path, config)
    events = []
    commit, backward = MemoryState.commit, trainer.accelerator.backward

    def record_commit(state: MemoryState, new: Any) -> MemoryState:
        events.append("commit")
        return commit(state, new)

    def record_backward(loss: Tensor, **options: Any) -> None:
        backward(loss, **options)
        events.append("backward")

    monkeypatch.setattr(MemoryState, "commit", record_commit)
    monkeypatch.setattr(trainer.accelerator, "backward", record_backward)
    trainer.train()
    assert events == ["backward", "commit"] * (3 * 5)


def test_memory_changes_the_losses(tmp_path):
    config = training_config(max_steps=12, learning_rate=3e-2)
    make_trainer(tmp_path / "with", config).train()
    make_trainer(tmp_path / "without", config, model={"knn_memory": None}).train()
    assert losses(tmp_path / "with") != pytest.approx(losses(tmp_path / "without"), abs=1e-6)


def test_log_lines_hold_gates_scales_fill_and_exact_loss(tmp_path):
    trainer = make_trainer(tmp_path, training_config(log_every=3))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    last = lines[-1]
    decoder = trainer.trained
    for name, value in decoder.memory_metrics().items():
        assert last[name] == value
    assert {"gate/layer1/mean", "scale/layer1/mean"} <= last.keys()
    store = trainer.memory[0].stores[1]
    fill = (store.num_written.clamp(max=23) / 23).mean().item()
    assert last["memory_fill"] == pytest.approx(fill)
    assert last["tokens_per_second"] > 0
    dataset = make_dataset(trainer.training_config)
    assert last["num_tokens"] == sum(int(dataset[index]["num_tokens"]) for index in range(16))


def test_logged_loss_is_the_mean_over_predicted_tokens_of_all_steps_since_the_last_line(tmp_path):
    every, window = training_config(), training_config(log_every=4)
    make_trainer(tmp_path / "every", every).train()
    make_trainer(tmp_path / "window", window).train()
    dataset = make_dataset(every)
    counts = [int((dataset[2 * s]["labels"] >= 0).sum() + (dataset[2 * s + 1]["labels"] >= 0).sum())
              for s in range(8)]  # fmt: skip
    single = losses(tmp_path / "every")
    expected = [
        sum(single[s] * counts[s] for s in steps) / sum(counts[s] for s in steps)
        for steps in (range(4), range(4, 8))
    ]
    assert losses(tmp_path / "window") == pytest.approx(expected)


def test_loss_that_is_not_a_number_is_logged_as_it_is(tmp_path):
    trainer = make_trainer(tmp_path, training_config(max_steps=2), model={"knn_memory": None})
    with torch.no_grad():
        trainer.trained.embedding.weight.fill_(math.nan)
    trainer.train()
    assert losses(tmp_path) == ["nan", "nan"]


def test_gradients_of_any_length_can_be_taken_as_they_are(tmp_path):
    for name, length in (("inf", math.inf), ("large", 1e30), ("short", 1e-3)):
        config = training_config(max_steps=3, max_gradient_norm=length)
        make_trainer(tmp_path / name, config).train()
    assert losses(tmp_path / "inf") == losses(tmp_path / "large") != losses(tmp_path / "short")


def _evaluate_with_memory(decoder: Decoder) -> dict[str, float]:
    """Reads documents into a memory of its own, and uses up random numbers."""
    dataset = make_dataset(training_config())
    state = decoder.new_state(2)
    total = torch.rand(5).sum().item() * 0
    assert not decoder.training
    assert not torch.is_grad_enabled()
    for step in range(6):
        batch = collate([dataset[2 * step], dataset[2 * step + 1]])
        out = TrainedModel(decoder)(**batch, state=state)
        state = state.commit(out.new_entries)
        total += out.loss.item()
    return {"loss": total}


def test_evaluation_in_between_changes_nothing(tmp_path):
    model = {"dropout": 0.2}
    plain = make_trainer(tmp_path / "plain", training_config(), model=model)
    plain.train()
    evaluated = make_trainer(
        tmp_path / "evaluated",
        training_config(evaluate_every=3),
        model=model,
        evaluate=_evaluate_with_memory,
    )
    evaluated.train()
    lines = metrics_of(tmp_path / "evaluated")
    evaluations = [line for line in lines if "evaluation/loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6, 8]
    assert [line for line in lines if "loss" in line] == metrics_of(tmp_path / "plain")
    assert model_fingerprint(evaluated.trained) == model_fingerprint(plain.trained)


def test_an_evaluation_that_fails_costs_nothing(tmp_path):
    config = training_config(max_steps=7, log_every=2, save_every=3, evaluate_every=3)
    failing = [6, 7]

    def evaluate(decoder):
        step = trainer.state.global_step
        if failing and step == failing[0]:
            failing.pop(0)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"sum": decoder.embedding.weight.sum().item()}

    trainer = make_trainer(tmp_path / "run", config, model={"dropout": 0.2}, evaluate=evaluate)
    for step in (6, 7):
        # no disk is blamed for a lack of memory
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            trainer.train(None if step == 6 else find_checkpoint(tmp_path / "run"))
        assert find_checkpoint(tmp_path / "run").step == step
        trainer = make_trainer(tmp_path / "run", config, model={"dropout": 0.2}, evaluate=evaluate)
    trainer.train(find_checkpoint(tmp_path / "run"))
    resumed = trainer
    trainer = make_trainer(tmp_path / "whole", config, model={"dropout": 0.2}, evaluate=evaluate)
    trainer.train()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "loss" not in line] == [
        3,
        6,
        7,
    ]
    assert model_fingerprint(resumed.trained) == model_fingerprint(trainer.trained)


def test_bfloat16_is_close_to_float32_and_keeps_float32_weights(tmp_path):
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(tmp_path / precision, training_config(precision=precision))
        trainer.train()
    assert {parameter.dtype for parameter in trainer.trained.parameters()} == {torch.float32}
    # bfloat16 has 8 bits
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=1e-2)
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")


def test_standard_output_stays_free_for_results(tmp_path, capfd):
    make_trainer(tmp_path, training_config(max_steps=2)).train()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("step 1  loss 3.")


def test_progress_bar_shows_on_a_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    make_trainer(tmp_path, training_config(max_steps=2)).train()
    err = capfd.readouterr().err
    assert "2/2" in err
    assert "steps/s" in err


def test_tensorboard_holds_the_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make_trainer(tmp_path, training_config(log_every=4)).train()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert logged == [
        (4, pytest.approx(losses(tmp_path)[0])),
        (8, pytest.approx(losses(tmp_path)[1])),
    ]
    assert "gate/layer1/mean" in events.Tags()["scalars"]


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setattr(TensorboardCallback, "is_available", staticmethod(lambda: False))
    make_trainer(tmp_path, training_config(max_steps=2)).train()
    assert not (tmp_path / "tensorboard").exists()
    assert len(losses(tmp_path)) == 2


def test_one_process_uses_one_gpu_and_says_so(tmp_path, monkeypatch, caplog):
    class SeveralGpus(arguments_module.TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 3

    monkeypatch.setattr(arguments_module, "TrainingArguments", SeveralGpus)
    arguments = arguments_module.training_arguments(training_config(), tmp_path)
    # the Trainer would split batches over threads, and multiply their size
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 2)
    assert "torchrun --nproc-per-node 3" in caplog.text


def test_dataset_must_fit_the_run(tmp_path):
    config = training_config()
    corpus = Documents()

    def plan(**changes: Any) -> SegmentDataset:
        settings = {"segment_length": 7, "num_rows": 2, "num_steps": 8} | changes
        return SegmentDataset(corpus, RowPlan(corpus.lengths, **settings))

    for changes, message in (
        ({"num_rows": 3}, "accumulation_steps = 2 rows, got 3"),
        ({"num_steps": 5}, r"max_steps \(8\) steps, got 5"),
        ({"segment_length": 5}, "segment_length 7, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, config, dataset=plan(**changes))

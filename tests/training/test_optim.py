"""Parameter groups and schedules."""

import pytest
import torch
from training_setup import VOCAB, model_config, training_config
from transformers.optimization import get_scheduler

from byheart.memory.config import KnnMemoryConfig
from byheart.models.decoder import Decoder
from byheart.training.optim import make_optimizer, parameter_groups, schedule_arguments


def _decoder() -> Decoder:
    knn = KnnMemoryConfig(layers=(1,), memory_size=23, top_k=4, combine="content_gate")
    return Decoder(model_config(knn_memory=knn).resolve(VOCAB))


def _group_of_each(decoder: Decoder, groups) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    found = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


def test_every_parameter_is_in_the_group_it_belongs_to():
    config = training_config(learning_rate=0.5, weight_decay=0.25, gate_learning_rate_factor=7.0)
    decoder = _decoder()
    for name, group in _group_of_each(decoder, parameter_groups(decoder, config)).items():
        last = name.rpartition(".")[2]
        is_scalar = last in ("log_scale", "gate_bias", "gate_weight", "position_bias")
        decays = last == "weight" and "norm" not in name and "embedding" not in name
        assert group["lr"] == (3.5 if is_scalar else 0.5), name
        assert group["weight_decay"] == (0.25 if decays else 0.0), name


def test_first_group_has_the_base_rate_because_it_is_the_one_logged():
    assert parameter_groups(_decoder(), training_config())[0]["lr"] == 3e-3


def test_frozen_parameters_are_left_out():
    decoder = _decoder()
    decoder.embedding.weight.requires_grad_(False)
    listed = [p for g in parameter_groups(decoder, training_config()) for p in g["params"]]
    assert all(p is not decoder.embedding.weight for p in listed)


def _rates(num_steps: int, **changes) -> list[list[float]]:
    config = training_config(learning_rate=0.5, gate_learning_rate_factor=10.0, **changes)
    optimizer = make_optimizer(_decoder(), config)
    arguments = schedule_arguments(config)
    scheduler = get_scheduler(
        arguments["lr_scheduler_type"],
        optimizer,
        arguments["warmup_steps"],
        num_steps,
        arguments["lr_scheduler_kwargs"],
    )
    rates = []
    for _ in range(num_steps + 1):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "linear", "rsqrt", "constant"])
def test_rate_rises_linearly_and_groups_keep_their_ratio(schedule):
    rates = _rates(12, schedule=schedule, warmup_steps=5)
    assert [rate[0] for rate in rates[:6]] == pytest.approx([0.1 * step for step in range(6)])
    for base, other, scalars in rates:
        assert (other, scalars) == pytest.approx((base, 10 * base))


@pytest.mark.parametrize(
    ("changes", "middle", "last"),
    [
        ({"schedule": "cosine"}, 0.275, 0.05),
        ({"schedule": "cosine", "min_learning_rate_ratio": 0.0}, 0.25, 0.0),
        ({"schedule": "linear"}, 0.275, 0.05),
        ({"schedule": "linear", "min_learning_rate_ratio": 0.5}, 0.375, 0.25),
        ({"schedule": "constant"}, 0.5, 0.5),
        # 1 / sqrt(step), 0.5 at step 4
        ({"schedule": "rsqrt"}, 0.5 * (4 / 10) ** 0.5, 0.25),
    ],
)
def test_schedules_end_where_they_should(changes, middle, last):
    rates = _rates(16, warmup_steps=4, **changes)
    assert (rates[10][0], rates[16][0]) == pytest.approx((middle, last))


def test_one_step_moves_scalars_by_their_own_rate():
    config = training_config(learning_rate=1e-3, weight_decay=0.0, gate_learning_rate_factor=10.0)
    decoder = _decoder()
    optimizer = make_optimizer(decoder, config)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # the first step of Adam is the rate, whatever the gradient
    moved = {name: (before[name] - p).abs().max().item() for name, p in decoder.named_parameters()}
    assert moved["blocks.1.attention.mix.gate_bias"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["blocks.0.attention.log_scale"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["blocks.0.expand.weight"] == pytest.approx(1e-3, rel=1e-3)

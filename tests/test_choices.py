"""Every config refuses a word that is none of its choices, and names them; and NaN and infinity."""

import importlib
import math
import pkgutil
import re
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import byheart
from byheart.adapters.attach_config import AttachConfig
from byheart.data.probes import ProbeConfig
from byheart.data.tasks import TaskConfig
from byheart.evaluation.flops_shapes import NAMED_SHAPES
from byheart.memory.config import KnnMemoryConfig
from byheart.models.config import DecoderConfig
from byheart.models.generate import SamplingConfig
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.training.config import DataConfig, ModelConfig, PretrainedConfig, TrainingConfig
from byheart.training.task_config import (
    CurriculumConfig,
    EncoderConfig,
    MemoryPart,
    TaskPart,
    TaskRunConfig,
    TaskTrainingConfig,
)

CONFIGS: list[Any] = [
    AttachConfig(),
    KnnMemoryConfig(layers=(0,)),
    DecoderConfig(vocab_size=7),
    RecurrentMemoryConfig(segment_length=5),
    ProbeConfig(name="passkey"),
    TaskConfig(name="memorize", segment_length=50),
    TrainingConfig(),
    ModelConfig(),
    PretrainedConfig(path="folder"),
    DataConfig(train="texts"),
    CurriculumConfig(),
    EncoderConfig(),
    MemoryPart(),
    TaskPart(name="memorize"),
    TaskTrainingConfig(),
    next(iter(NAMED_SHAPES.values())),
]


def choices_of(cls):
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if get_origin(hints[f.name]) is Literal}


CASES = [(config, name) for config in CONFIGS for name in choices_of(type(config))]


@pytest.mark.parametrize(
    ("config", "name"), CASES, ids=[f"{type(config).__name__}.{name}" for config, name in CASES]
)
@pytest.mark.usefixtures("without_typechecks")
def test_another_word_is_refused(config, name):
    choices = get_args(choices_of(type(config))[name])
    listed = ", ".join(map(repr, choices))
    with pytest.raises(ValueError, match=rf"{name} must be one of {listed}, got 'tahn'\."):
        replace(config, **{name: "tahn"})
    # another word may need another field: only the config's own is sure to fit
    replace(config, **{name: getattr(config, name)})


WITH_NUMBERS: list[Any] = [
    AttachConfig(knn=KnnMemoryConfig(layers=(0,))),
    KnnMemoryConfig(layers=(0,)),
    DecoderConfig(vocab_size=7),
    RecurrentMemoryConfig(segment_length=5, update="gated"),
    SamplingConfig(),
    TaskConfig(name="memorize", segment_length=50),
]
# parts of runs: a run refuses for all of them (tests/training)
PARTS_OF_RUNS = {
    TrainingConfig, ModelConfig, CurriculumConfig, EncoderConfig, MemoryPart, TaskPart,
    TaskTrainingConfig, TaskRunConfig,
}  # fmt: skip


def numbers_of(cls):
    return [f.name for f in fields(cls) if f.type in (float, float | None)]


NUMBERS = [(config, name) for config in WITH_NUMBERS for name in numbers_of(type(config))]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("config", "name"), NUMBERS, ids=[f"{type(config).__name__}.{name}" for config, name in NUMBERS]
)
def test_a_number_that_is_none_is_refused(config, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a finite number, got {value}\."):
        replace(config, **{name: value})


WHOLE = [
    (RecurrentMemoryConfig(segment_length=5), "segment_length", 8.5, "a whole number"),
    (RecurrentMemoryConfig(segment_length=5), "num_memory_tokens", True, "a whole number"),
    (RecurrentMemoryConfig(segment_length=5), "bptt_depth", 1.5, "a whole number"),
    (RecurrentMemoryConfig(segment_length=5), "end_ids", (5.9,), "a tuple of whole numbers"),
    (RecurrentMemoryConfig(segment_length=5), "start_ids", 5, "a tuple of whole numbers"),
    (RecurrentMemoryConfig(segment_length=5), "replay", "no", "True or False"),
    (KnnMemoryConfig(layers=(0,)), "layers", 0, "a tuple of whole numbers"),
    (KnnMemoryConfig(layers=(0,)), "top_k", 4.0, "a whole number"),
    (DecoderConfig(vocab_size=7), "vocab_size", "7", "a whole number"),
    (DecoderConfig(vocab_size=7), "vocab_size", None, "a whole number"),
    (DecoderConfig(vocab_size=7), "self_visible", 1, "True or False"),
    (SamplingConfig(), "top_k", 2.5, "a whole number"),
    (TaskConfig(name="memorize", segment_length=50), "any_length", "yes", "True or False"),
]


@pytest.mark.parametrize(("config", "name", "value", "wanted"), WHOLE)
@pytest.mark.usefixtures("without_typechecks")
def test_what_is_no_whole_number_or_truth_value_is_refused(config, name, value, wanted):
    message = rf"{name} must be {wanted}, got {re.escape(repr(value))}\."
    with pytest.raises(TypeError, match=message):
        replace(config, **{name: value})


@pytest.mark.usefixtures("without_typechecks")
def test_whole_numbers_of_numpy_are_whole():
    assert RecurrentMemoryConfig(segment_length=np.int64(5), bptt_depth=None).segment_length == 5


def test_no_config_is_left_out():
    found = set()
    for module in pkgutil.walk_packages(byheart.__path__, "byheart."):
        name = module.name
        if name.rpartition(".")[2].endswith(("_kernels", "faiss_index", "store_machine", "plots")):
            continue
        for thing in vars(importlib.import_module(name)).values():
            if isinstance(thing, type) and is_dataclass(thing) and thing.__module__ == name:
                found.add(thing)
    configs = {one for one in found if one.__name__.endswith(("Config", "Part", "Shape"))}
    assert {one for one in configs if choices_of(one)} == {type(config) for config in CONFIGS}
    with_numbers = {type(config) for config in WITH_NUMBERS}
    assert {one for one in configs if numbers_of(one)} == with_numbers | PARTS_OF_RUNS

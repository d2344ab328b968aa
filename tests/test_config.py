import enum
import json
import math
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byheart.config import apply_overrides, from_dict, load_config, save_config, to_dict


class Merge(str, enum.Enum):
    GATE = "gate"
    JOINT = "joint"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    layers: tuple[int, ...]
    memory_size: int
    top_k: int = 32
    merge: Merge = Merge.GATE

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.memory_size:
            msg = f"top_k must be between 1 and memory_size ({self.memory_size}), got {self.top_k}."
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    num_layers: int = 12
    gate_bias: float = 0.0
    window: int | Literal["all"] = 512
    knn_memory: MemoryConfig | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    model: ModelConfig
    name: str = "run"
    uses_bf16: bool = False
    betas: tuple[float, float] = (0.9, 0.98)
    scheduler: Literal["rsqrt", "cosine"] = "rsqrt"
    note: str | None = None


MEMORY = MemoryConfig(layers=(3, 7), memory_size=8192)
RUN = RunConfig(model=ModelConfig(knn_memory=MEMORY))
BARE = RunConfig(model=ModelConfig())

runs = st.builds(
    RunConfig,
    model=st.builds(
        ModelConfig,
        num_layers=st.integers(),
        gate_bias=st.floats(allow_nan=False),
        window=st.integers() | st.just("all"),
        knn_memory=st.none()
        | st.builds(
            MemoryConfig,
            layers=st.lists(st.integers()).map(tuple),
            memory_size=st.integers(min_value=5),
            top_k=st.integers(1, 5),
            merge=st.sampled_from(Merge),
        ),
    ),
    name=st.text(),
    uses_bf16=st.booleans(),
    betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    note=st.none() | st.text(),
)


@given(runs)
def test_a_config_survives_the_way_through_json(run):
    text = json.dumps(to_dict(run), allow_nan=False)
    assert from_dict(RunConfig, json.loads(text)) == run


def test_nan_survives_too():
    loaded = from_dict(ModelConfig, to_dict(ModelConfig(gate_bias=math.nan)))
    assert math.isnan(loaded.gate_bias)


def test_to_dict_writes_defaults_and_plain_values():
    assert to_dict(RUN) == {
        "model": {
            "num_layers": 12,
            "gate_bias": 0.0,
            "window": 512,
            "knn_memory": {
                "layers": [3, 7],
                "memory_size": 8192,
                "top_k": 32,
                "merge": "gate",
            },
        },
        "name": "run",
        "uses_bf16": False,
        "betas": [0.9, 0.98],
        "scheduler": "rsqrt",
        "note": None,
    }


def test_whole_numbers_fit_float_fields():
    gate_bias = from_dict(ModelConfig, {"gate_bias": 3}).gate_bias
    assert gate_bias == 3.0
    assert type(gate_bias) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": {"num_layers": "twelve"}},
            r"model\.num_layers must be int, got 'twelve' \(str\)",
        ),
        ({"model": {"num_layers": True}}, r"model\.num_layers must be int, got True \(bool\)"),
        ({"model": {"num_layers": 12.0}}, r"model\.num_layers must be int, got 12\.0"),
        ({"model": {"gate_bias": False}}, r"model\.gate_bias must be float, got False"),
        ({"model": {"gate_bias": "zero"}}, r"model\.gate_bias must be float"),
        (
            {"model": {"window": "some"}},
            r"model\.window must be int \| Literal\['all'\], got 'some'",
        ),
        ({"model": {"knn_memory": 5}}, r"model\.knn_memory must be a mapping for MemoryConfig"),
        ({"model": {}, "uses_bf16": 1}, r"uses_bf16 must be bool, got 1 \(int\)\. Write true or"),
        ({"model": {}, "note": 5}, r"note must be str, got 5"),
        ({"model": {}, "betas": 0.9}, r"betas must be a list, got 0\.9"),
        ({"model": {}, "betas": [0.9, "x"]}, r"betas\[1\] must be float"),
    ],
)
def test_wrong_types_are_refused_by_dotted_path(values, message):
    with pytest.raises(TypeError, match=message):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"num_layer": 3}}, r"model\.num_layer is not a known.*mean model\.num_layers\?"),
        ({"model": {}, "zzzzzz": 3}, r"zzzzzz is not a known setting\. Known keys: model, name"),
        ({}, r"RunConfig needs a value for model"),
        (
            {"model": {"knn_memory": {"top_k": 3}}},
            r"model\.knn_memory\.layers, model\.knn_memory\.m",
        ),
        ({"model": {}, "betas": [0.9]}, r"betas must have 2 values, got 1"),
        ({"model": {}, "scheduler": "linear"}, r"scheduler must be one of 'rsqrt', 'cosine', got"),
        (
            {"model": {"knn_memory": {"layers": [1], "memory_size": 5}}},
            r"model\.knn_memory: top_k must be between 1 and memory_size \(5\), got 32",
        ),
        (
            {"model": {"knn_memory": {"layers": [1], "memory_size": 64, "merge": "sum"}}},
            r"model\.knn_memory\.merge must be one of 'gate', 'joint', got 'sum'",
        ),
    ],
)
def test_wrong_keys_and_values_are_refused_by_dotted_path(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, values)


def test_literals_tell_one_from_true():
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        level: Literal[0, 1] = 0

    assert from_dict(Config, {"level": 1}).level == 1
    with pytest.raises(ValueError, match="level must be one of 0, 1, got True"):
        from_dict(Config, {"level": True})


def test_only_configs_of_plain_values_become_dictionaries():
    @dataclass(frozen=True)
    class Config:
        value: object

    with pytest.raises(TypeError, match=r"value\[1\] must be a value that JSON can hold, got set"):
        to_dict(Config(value=(1, {2})))
    with pytest.raises(TypeError, match="instance of a dataclass, got type"):
        to_dict(Config)
    with pytest.raises(TypeError, match="which configs do not support"):
        from_dict(Config, {"value": 3})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layers=7", {"num_layers": 7}),
        ("model.num_layers=1e2", {"num_layers": 100}),
        ("model.gate_bias=-3", {"gate_bias": -3.0}),
        ("model.gate_bias=-inf", {"gate_bias": -math.inf}),
        ("model.window=all", {"window": "all"}),
        ('model.knn_memory={"layers": [5], "memory_size": 64}', {
            "knn_memory": MemoryConfig(layers=(5,), memory_size=64),
        }),
    ],
)  # fmt: skip
def test_overrides_take_the_type_of_their_field(override, expected):
    assert apply_overrides(BARE, [override]) == RunConfig(model=ModelConfig(**expected))


@pytest.mark.parametrize(
    ("raw", "expected"), [("run 5", "run 5"), ("17", "17"), ('"17"', "17"), ("a=b", "a=b")]
)
def test_overrides_of_strings_need_no_quotes(raw, expected):
    assert apply_overrides(BARE, [f"name={raw}"]).name == expected


def test_null_turns_an_optional_config_off():
    assert apply_overrides(RUN, ["model.knn_memory=null"]) == BARE
    assert RUN.model.knn_memory == MEMORY


def test_overrides_are_checked_together_and_the_last_wins():
    changed = apply_overrides(
        RUN,
        [
            "model.knn_memory.top_k=9000",
            "model.knn_memory.memory_size=9001",
            "model.knn_memory.merge=gate",
            "model.knn_memory.merge=joint",
        ],
    )
    memory = MemoryConfig(layers=(3, 7), memory_size=9001, top_k=9000, merge=Merge.JOINT)
    assert changed.model.knn_memory == memory


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers", r"must have the form key=value, got 'model\.num_layers'"),
        ("=3", r"must have the form key=value"),
        ("model.knn_memory.top_k=3", r"knn_memory is off \(null\).*=\{\"layers\": \.\.\., \"mem"),
        ("model.num_layer=3", r"Did you mean model\.num_layers\?"),
        ("knn_memory.top_k=3", r"knn_memory is not a known.*mean model\.knn_memory\.top_k\?"),
        ("num_layers=3", r"Did you mean model\.num_layers\?"),
        ("model.num_layers.x=3", r"model\.num_layers is a single value"),
        ("scheduler=linear", r"scheduler must be one of"),
    ],
)
def test_overrides_that_cannot_apply_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides(BARE, [override])


def test_overrides_of_the_wrong_type_are_refused():
    with pytest.raises(TypeError, match=r"model\.num_layers must be int, got 'many'"):
        apply_overrides(BARE, ["model.num_layers=many"])
    with pytest.raises(TypeError, match=r"uses_bf16 must be bool, got 'True'.*true or false"):
        apply_overrides(BARE, ["uses_bf16=True"])


def test_a_saved_config_is_loaded_equal(tmp_path):
    path = tmp_path / "config.json"
    save_config(RUN, path)
    save_config(BARE, path)
    assert load_config(RunConfig, path) == BARE
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    save_config(BARE, path)

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_config(RUN, path)
    assert load_config(RunConfig, path) == BARE
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_file_that_is_not_json_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("model: {}")
    with pytest.raises(ValueError, match=r"config\.json must be a JSON file: Expecting value"):
        load_config(RunConfig, path)
    path.write_text("[3]")
    with pytest.raises(TypeError, match=r"config\.json must hold a JSON object, got list"):
        load_config(RunConfig, path)

"""Configs of a run: what they refuse, and how the vocabulary gets in."""

import math

import pytest
from training_setup import model_config, run_config

from byheart.config import apply_overrides, from_dict, to_dict
from byheart.models.config import DecoderConfig, preset
from byheart.training.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_device": 0}, "rows_per_device must be at least 1, got 0"),
        ({"keep_checkpoints": 1}, "keep_checkpoints must be at least 2, got 1"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0, got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number, got inf. Write"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number, got inf"),
        ({"gate_learning_rate_factor": math.inf}, "factor must be a finite number, got inf"),
        ({"max_gradient_norm": math.nan}, "max_gradient_norm must be above 0, got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
        ({"min_learning_rate_ratio": 1.0}, "min_learning_rate_ratio must be .* below 1, got 1.0"),
        (
            {"schedule": "constant", "min_learning_rate_ratio": 0.1},
            "min_learning_rate_ratio has no effect with schedule='constant', got 0.1",
        ),
        ({"schedule": "rsqrt", "warmup_steps": 0}, "must have warmup_steps of at least 1, got 0"),
    ],
)
def test_training_config_refuses_what_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name", ["attention_scale_init", "gate_bias_init", "dropout", "knn_memory.age_slope"]
)
def test_numbers_of_the_model_that_are_none_are_refused(tmp_path, name, value):
    pattern = rf"model(\.|: |\.knn_memory: ){name} must be .*, got {value}".replace(
        "knn_memory.age_slope must", "(knn_memory.)?age_slope must"
    )
    with pytest.raises(ValueError, match=pattern):
        apply_overrides(run_config(tmp_path), [f"model.{name}={value}"])


def test_evaluation_and_data_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        EvaluationConfig(rows=0)
    with pytest.raises(ValueError, match="max_documents must be at least 1, got 0"):
        EvaluationConfig(max_documents=0)
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        EvaluationConfig(max_tokens=1)
    with pytest.raises(ValueError, match=r"memory_sizes must be at least 0, got \[5, -1\]"):
        EvaluationConfig(memory_sizes=(5, -1))
    with pytest.raises(ValueError, match="'bpe:N' with a number of tokens, got 'bpe:many'"):
        DataConfig(train="x", tokenizer="bpe:many")


def test_bpe_size_is_read_from_the_tokenizer_name():
    assert DataConfig(train="x", tokenizer="bpe:300").bpe_size == 300
    assert DataConfig(train="x", tokenizer="bytes").bpe_size is None
    assert DataConfig(train="x", tokenizer="some/bpe").bpe_size is None


def test_vocabulary_comes_from_the_tokenizer():
    config = model_config()
    assert config.vocab_size == 0
    resolved = config.resolve(257)
    assert type(resolved) is DecoderConfig
    assert resolved.vocab_size == 257
    assert resolved.knn_memory == config.knn_memory


def test_vocabulary_that_is_not_the_tokenizers_is_refused():
    assert model_config(vocab_size=257).resolve(257).vocab_size == 257
    with pytest.raises(ValueError, match=r"must be the tokenizer's 257, got 300\. Leave it out"):
        model_config(vocab_size=300).resolve(257)


def test_model_config_checks_like_a_decoder_config():
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got -1"):
        model_config(vocab_size=-1)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        model_config(num_layers=0)


def test_preset_is_the_decoders_preset():
    config = ModelConfig.preset("5m", memory_size=100, top_k=7, dropout=0.25)
    assert config.resolve(31) == preset("5m", 31, memory_size=100, top_k=7, dropout=0.25)


def test_run_config_survives_json_without_a_vocabulary(tmp_path):
    run = run_config(tmp_path)
    plain = to_dict(run)
    assert from_dict(RunConfig, plain) == run
    del plain["model"]["vocab_size"]
    assert from_dict(RunConfig, plain) == run
    changed = apply_overrides(run, ["training.max_steps=5", "model.knn_memory.memory_size=29"])
    assert changed.training.max_steps == 5
    assert changed.model.knn_memory.memory_size == 29

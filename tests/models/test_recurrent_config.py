import pytest

from byheart.models.recurrent_config import RecurrentMemoryConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_length": 0}, r"segment_length must be at least 1, got 0\."),
        ({"num_memory_tokens": -1}, r"num_memory_tokens must be at least 0, got -1\."),
        ({"bptt_depth": 0}, r"bptt_depth must be at least 1 .*, got 0\. Use None"),
        ({"noise": -0.1}, r"noise must be at least 0, got -0\.1\."),
        ({"gate_bias_init": 1.0}, r"no effect with update='replace', got 1\.0\."),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RecurrentMemoryConfig(**{"segment_length": 5, **settings})


def test_special_tokens_are_counted():
    config = RecurrentMemoryConfig(
        segment_length=5, start_ids=(1,), separator_ids=(2,), end_ids=(2, 3)
    )
    assert config.num_special_tokens == 4

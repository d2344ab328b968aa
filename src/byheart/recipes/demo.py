"""The run behind `make demo`."""

from byheart.data.sample import sample_path
from byheart.memory.config import KnnMemoryConfig
from byheart.ops.processor import fast_precision
from byheart.training.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)


def demo() -> RunConfig:
    """A small model on embedded real text (the Python standard library): minutes on 2 CPU cores."""
    return RunConfig(
        name="demo",
        model=ModelConfig(
            num_layers=4,
            embed_dim=128,
            num_heads=4,
            head_dim=32,
            hidden_dim=512,
            segment_length=64,
            xl_cache_length=64,
            # as in the comparison: the last layer matches what followed a token before
            gate_bias_init=-1.0,
            knn_memory=KnnMemoryConfig(layers=(3,), memory_size=2048, age_slope=0.5),
        ),
        data=DataConfig(
            train=str(sample_path("train")),
            validation=str(sample_path("validation")),
            tokenizer="bpe:1024",
        ),
        training=TrainingConfig(
            rows_per_device=32,
            max_steps=1400,
            learning_rate=3e-3,
            warmup_steps=100,
            weight_decay=0.01,
            precision=fast_precision(),
            save_every=250,
            log_every=50,
        ),
        evaluation=EvaluationConfig(rows=8, max_tokens=16_384),
    )

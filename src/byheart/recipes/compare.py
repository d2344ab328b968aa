"""Three small models that differ in their memory alone: what does it bring?"""

from dataclasses import replace

from byheart.memory.config import KnnMemoryConfig
from byheart.ops.processor import fast_precision
from byheart.training.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)


def compare_memory() -> RunConfig:
    """Of three models to compare: XL cache and kNN memory."""
    return RunConfig(
        name="compare-memory",
        model=ModelConfig(
            num_layers=4,
            embed_dim=128,
            num_heads=4,
            head_dim=32,
            hidden_dim=512,
            segment_length=64,
            xl_cache_length=64,
            # small models match "what followed this token before" in their last layer, and a gate
            # that starts at 0.27 leaves local attention time to learn it
            gate_bias_init=-1.0,
            knn_memory=KnnMemoryConfig(layers=(3,), memory_size=32_768, top_k=32, age_slope=0.5),
        ),
        # longer documents are cut, so that a memory of every age is met, the empty one too
        data=DataConfig(train="DOCUMENTS", tokenizer="bpe:1024", max_document_tokens=32_768),
        training=TrainingConfig(
            rows_per_device=32,
            max_steps=5000,
            learning_rate=3e-3,
            warmup_steps=100,
            weight_decay=0.01,
            precision=fast_precision(),
            save_every=250,
            log_every=50,
        ),
        evaluation=EvaluationConfig(rows=18, max_tokens=32_768),
    )


def compare_xl() -> RunConfig:
    """Of three models to compare: XL cache, no kNN memory."""
    run = compare_memory()
    assert run.model is not None
    return replace(run, name="compare-xl", model=replace(run.model, knn_memory=None))


def compare_none() -> RunConfig:
    """Of three models to compare: neither XL cache nor kNN memory."""
    run = compare_xl()
    assert run.model is not None
    return replace(run, name="compare-none", model=replace(run.model, xl_cache_length=0))

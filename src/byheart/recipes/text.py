"""Starting points for the user's own documents; name them with --data and --validation."""

from dataclasses import replace

from byheart.adapters.attach_config import AttachConfig
from byheart.memory.config import KnnMemoryConfig
from byheart.ops.processor import fast_precision
from byheart.training.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PretrainedConfig,
    RunConfig,
    TrainingConfig,
)

# filled in by --data and --model; the errors about what is missing say so
_YOUR_DOCUMENTS = "DOCUMENTS"
YOUR_MODEL = "MODEL"
"""Path that stands for a pretrained model."""


def text() -> RunConfig:
    """A 5M-parameter model with a memory of 8K for your own documents, on a laptop or one GPU."""
    return RunConfig(
        name="text",
        model=replace(
            # as in the comparison: the last layer matches what followed a token before
            ModelConfig.preset("5m", gate_bias_init=-1.0),
            knn_memory=KnnMemoryConfig(layers=(5,), memory_size=8192, age_slope=0.5),
        ),
        data=DataConfig(train=_YOUR_DOCUMENTS, tokenizer="bpe:4096", max_document_tokens=32_768),
        training=TrainingConfig(
            rows_per_device=8,
            max_steps=10_000,
            learning_rate=2e-3,
            warmup_steps=200,
            weight_decay=0.01,
            precision=fast_precision(),
        ),
    )


def attach() -> RunConfig:
    """A memory of 8K on a pretrained decoder that you name with --model.

    All weights learn; --set pretrained.trains=memory leaves the model's own as they are,
    memory_layers those of the layers without a memory. The layer is the paper's, the 9th of 12; in
    the models of up to 6 layers that were measured the last one learned most
    (--set pretrained.memory.knn.layers=[-1], docs/log.md).
    """
    knn = KnnMemoryConfig(layers=(-4,), memory_size=8192, age_slope=0.5)
    return RunConfig(
        name="attach",
        pretrained=PretrainedConfig(
            path=YOUR_MODEL, memory=AttachConfig(knn=knn, xl_cache_length=512)
        ),
        data=DataConfig(train=_YOUR_DOCUMENTS, tokenizer=YOUR_MODEL, max_document_tokens=32_768),
        training=TrainingConfig(
            rows_per_device=2,
            max_steps=1000,
            learning_rate=3e-5,
            # scale and gates are the only weights that are new
            gate_learning_rate_factor=1000.0,
            warmup_steps=50,
            weight_decay=0.0,
            precision=fast_precision(),
        ),
        evaluation=EvaluationConfig(short_tokens=512),
    )


def paper() -> RunConfig:
    """The paper's model: 12 layers, 184M parameters, 8K memory in layer 9, 2^17 tokens per step.

    Sizes and schedule are the paper's; AdamW stands in for Adafactor, see
    docs/memorizing-transformer.md. Rows are for 8 GPUs: 32 rows x 512 tokens on each.
    """
    return RunConfig(
        name="paper",
        model=ModelConfig.preset("184m", memory_size=8192),
        data=DataConfig(train=_YOUR_DOCUMENTS, tokenizer="bpe:32000"),
        training=TrainingConfig(
            rows_per_device=32,
            max_steps=500_000,
            learning_rate=1e-3,
            schedule="rsqrt",
            warmup_steps=1000,
            precision=fast_precision(),
            save_every=5000,
        ),
    )

"""Small runs for the tests of this folder."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byheart.data.rows import RowPlan, SegmentDataset
from byheart.memory.config import KnnMemoryConfig
from byheart.models.decoder import Decoder
from byheart.training.arguments import training_arguments
from byheart.training.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from byheart.training.trainer import MemoryTrainer

VOCAB = 31
TIMES = ("tokens_per_second",)


class Documents:
    """A corpus in memory: random tokens, documents of very different lengths."""

    def __init__(self, lengths: tuple[int, ...] = (41, 3, 19, 87, 8, 9, 60), seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.lengths = np.array(lengths)
        self._documents = [generator.integers(0, VOCAB, size=length) for length in lengths]
        self.fingerprint = f"documents {seed} {lengths}"
        self.document_ids = tuple(f"document {index}" for index in range(len(lengths)))
        self.read: list[int] = []

    def document(self, index: int) -> Any:
        self.read.append(index)
        return self._documents[index]


def model_config(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "num_layers": 2, "embed_dim": 11, "num_heads": 3, "head_dim": 5, "hidden_dim": 13,
        "segment_length": 7, "xl_cache_length": 7,
        "knn_memory": KnnMemoryConfig(layers=(1,), memory_size=23, top_k=4),
    }  # fmt: skip
    return ModelConfig(**(settings | changes))


def training_config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "rows_per_device": 2, "max_steps": 8, "warmup_steps": 2, "learning_rate": 3e-3,
        "save_every": 3, "log_every": 1,
    }  # fmt: skip
    return TrainingConfig(**(settings | changes))


def make_dataset(training: TrainingConfig, corpus: Documents | None = None) -> SegmentDataset:
    corpus = corpus or Documents()
    plan = RowPlan(
        corpus.lengths,
        segment_length=7,
        num_rows=training.rows_per_device * training.accumulation_steps,
        num_steps=training.max_steps,
        seed=5,
    )
    return SegmentDataset(corpus, plan)


def make_trainer(
    out: Path, config: TrainingConfig, *, model: dict[str, Any] | None = None, **options: Any
) -> MemoryTrainer:
    torch.manual_seed(config.seed)
    decoder = Decoder(model_config(**(model or {})).resolve(VOCAB))
    dataset = options.pop("dataset", None) or make_dataset(config)
    return MemoryTrainer(decoder, dataset, config, training_arguments(config, out), **options)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(out) if "loss" in line]


def write_documents(folder: Path, num_documents: int = 7, seed: int = 0) -> Path:
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_documents):
        words = generator.choices(["alpha", "beta", "gamma", "delta"], k=generator.randint(2, 30))
        (folder / f"{index}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def run_config(folder: Path, *, model: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    documents = folder / "documents"
    if not documents.exists():
        write_documents(documents)
    return RunConfig(
        name="tiny",
        model=model_config(**(model or {})),
        data=DataConfig(
            train=str(documents),
            validation=str(documents / "1.txt"),
            cache_dir=str(folder / "cache"),
        ),
        training=training_config(**training),
    )


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without times."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMES}
        for line in lines
    ]

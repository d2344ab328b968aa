"""How much of what a memory brings does a model get that was pretrained without one?

    python -m benchmarks.finetune --data TRAIN --validation VALIDATION --out DIRECTORY --work RUNS

Three runs of a small model of Llama's shape on the same documents: without memory; with a memory
from the start, on as many tokens; and the first one again with a memory attached, for 4 % of its
steps. The paper's 1B model closed 85 % of the gap after 4 % (Wu et al. 2022, "Fine-tuning a
non-memory model"). All three read segments without an XL cache, so that memory is all that tells
them apart; the first segment of each document, where no memory can help, is the short context that
must not get worse. Interrupted, the same command goes on.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from benchmarks.harness import machine_info
from byheart.adapters.attach_config import AttachConfig
from byheart.adapters.memory_saving import load_attached
from byheart.config import save_config
from byheart.data.corpus import TokenizedCorpus
from byheart.data.documents import iter_documents
from byheart.data.token_cache import tokenize_corpus
from byheart.data.tokenize import BpeTokenizer, load_tokenizer
from byheart.evaluation.perplexity import evaluate_perplexity
from byheart.memory.config import KnnMemoryConfig
from byheart.training.config import DataConfig, PretrainedConfig, RunConfig, TrainingConfig
from byheart.training.run import train

VOCAB, SEGMENT, MEMORY_SIZE = 1024, 128, 8192
MAX_TOKENS = 32_768
SHARE = 0.04

MEMORY = AttachConfig(
    knn=KnnMemoryConfig(layers=(-1,), memory_size=MEMORY_SIZE, top_k=32, age_slope=0.5),
    segment_length=SEGMENT,
    normalize_qk=True,
)
NO_MEMORY = AttachConfig(segment_length=SEGMENT)


def make_shape(folder: Path, documents: str) -> None:
    """Write the config of the model and a tokenizer learned from the documents."""
    if (folder / "config.json").is_file():
        return
    texts = (document.text for document in iter_documents(documents))
    tokenizer = BpeTokenizer.train(texts, VOCAB)
    tokenizer.save(folder)
    LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=256, intermediate_size=688,
        num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=4096, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip


def runs(arguments: argparse.Namespace, shape: Path) -> dict[str, RunConfig]:
    """Return the three runs, by name."""
    training = TrainingConfig(
        rows_per_device=16, max_steps=arguments.steps, learning_rate=2e-3, warmup_steps=100,
        weight_decay=0.01, precision="bfloat16", save_every=250, log_every=50,
        seed=arguments.seed,
    )  # fmt: skip
    none = RunConfig(
        name="none",
        pretrained=PretrainedConfig(path=str(shape), memory=NO_MEMORY, from_scratch=True),
        data=DataConfig(
            train=str(arguments.data), tokenizer=str(shape), max_document_tokens=MAX_TOKENS
        ),
        training=training,
    )
    start = replace(none, name="start", pretrained=replace(none.pretrained, memory=MEMORY))
    tuned = replace(
        none,
        name="tuned",
        pretrained=PretrainedConfig(
            path=str(arguments.work / "none" / "model" / "model"), memory=MEMORY
        ),
        training=replace(
            training, max_steps=round(SHARE * arguments.steps), learning_rate=arguments.tune_rate,
            warmup_steps=10, gate_learning_rate_factor=arguments.gate_factor, log_every=10,
            seed=arguments.seed + 1,
        ),
    )  # fmt: skip
    return {"none": none, "start": start, "tuned": tuned}


def learn(run: RunConfig, directory: Path) -> None:
    if not (directory / "result.json").is_file():
        train(run, directory, resume=any(directory.glob("checkpoint-*")))


def evaluate(run: RunConfig, directory: Path, corpus: TokenizedCorpus) -> dict[str, Any]:
    assert run.pretrained is not None
    model = load_attached(None, directory / "model")
    tokenizer = load_tokenizer(run.data.tokenizer)
    sizes = (0,) if run.pretrained.memory.knn is None else (0, 2048, MEMORY_SIZE)
    result = evaluate_perplexity(
        model, corpus, memory_sizes=sizes, rows=8, max_tokens_per_document=MAX_TOKENS,
        tokenizer=tokenizer,
    )  # fmt: skip
    return result.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=["none", "start", "tuned"])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tune-rate", type=float, default=5e-4)
    parser.add_argument("--gate-factor", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = arguments.work / "shape"
    make_shape(shape, str(arguments.data))
    arguments.out.mkdir(parents=True, exist_ok=True)
    corpus = tokenize_corpus(str(arguments.validation), load_tokenizer(str(shape)))
    summary: dict[str, Any] = {"machine": machine_info(["transformers"]), "runs": {}}
    for name, run in runs(arguments, shape).items():
        if name not in arguments.runs:
            continue
        directory = arguments.work / name
        learn(run, directory)
        save_config(run, arguments.out / f"{name}.config.json")
        shutil.copy(directory / "metrics.jsonl", arguments.out / f"{name}.metrics.jsonl")
        summary["runs"][name] = {
            "training": json.loads((directory / "result.json").read_text()),
            "evaluation": evaluate(run, directory, corpus),
        }
        (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
    if len(summary["runs"]) == len(runs(arguments, shape)):
        summary["closed"] = closed(summary["runs"])
        (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
        print(json.dumps(summary["closed"], indent=2))


def closed(found: dict[str, Any]) -> dict[str, float]:
    """Return how much of the gap is closed, and what short contexts lose."""

    def nats(name: str) -> float:
        return float(found[name]["evaluation"]["measurements"][-1]["nats_per_token"])

    def short(name: str) -> float:
        return float(found[name]["evaluation"]["measurements"][-1]["buckets"][0]["nats_per_token"])

    gap = nats("none") - nats("start")
    return {
        "nats_without_memory": nats("none"),
        "nats_with_memory_from_the_start": nats("start"),
        "nats_attached": nats("tuned"),
        "share_of_the_gap_closed": (nats("none") - nats("tuned")) / gap,
        "first_512_tokens_before": short("none"),
        "first_512_tokens_after": short("tuned"),
    }


if __name__ == "__main__":
    main()

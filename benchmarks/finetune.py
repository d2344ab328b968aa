"""How much of what a memory brings does a model get that was pretrained without one?

    python -m benchmarks.finetune --data TRAIN --validation VALIDATION --out DIRECTORY --work RUNS

Small models of Llama's shape on the same documents: `none` without memory; `start` with a memory
from the start, on as many tokens; and `tuned`, the first one again with a memory attached, for 4 %
of its steps. The paper's 1B model closed 85 % of the gap after 4 % (Wu et al. 2022, "Fine-tuning a
non-memory model"). All three read the same segments and see the same XL cache, if there is one, so
that memory is all that tells them apart; the first tokens of each document, where a memory holds
little, are the short context that must not get worse.

`tuned` is the result. Beside it stand `further`, which goes on for as many steps without a memory:
what `tuned` gains by the mere steps; and `tuned` with other rates, none of which was chosen by its
result.

Interrupted, the same command goes on. `--runs` names the runs to make in this process, so that
several processes can share the folders; the command without it makes what is missing, and the
summary.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, Qwen3Config
from transformers import PretrainedConfig as ModelShape

from benchmarks.harness import machine_info, write_json
from byheart.adapters.attach_config import AttachConfig
from byheart.adapters.memory_saving import load_attached
from byheart.config import load_config, save_config
from byheart.data.corpus import TokenizedCorpus
from byheart.data.documents import iter_documents
from byheart.data.token_cache import tokenize_corpus
from byheart.data.tokenize import BpeTokenizer, load_tokenizer
from byheart.evaluation.perplexity import evaluate_perplexity
from byheart.evaluation.result import PerplexityResult
from byheart.memory.config import KnnMemoryConfig
from byheart.training.config import DataConfig, PretrainedConfig, RunConfig, TrainingConfig
from byheart.training.run import train

VOCAB, MEMORY_SIZE, OLDER_SIZE = 1024, 8192, 2048
SHARE = 0.04
# rate and rate of the gates, in units of those of `tuned`
VARIATIONS = {
    "tuned": (1.0, 1.0),
    "tuned-slower": (0.3, 1.0),
    "tuned-faster": (3.0, 1.0),
    "tuned-gates": (1.0, 3.0),
}
RUNS = ("none", "start", "further", *VARIATIONS)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the settings that the runs depend on, and read the command line."""
    for name in ("data", "validation", "out", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--qk-norm", action="store_true", help="the shape of Qwen3")
    parser.add_argument("--segment", type=int, default=64)
    parser.add_argument("--xl-cache", type=int, default=0)
    parser.add_argument("--memory-layer", type=int, default=-1)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--start-gate-factor", type=float, default=1.0)
    parser.add_argument("--tune-rate", type=float, default=1e-3)
    parser.add_argument("--gate-factor", type=float, default=10.0)
    parser.add_argument("--document-tokens", type=int, default=131_072)
    parser.add_argument("--measured-tokens", type=int, default=16_384)
    parser.add_argument("--save-every", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_shape(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the config of the model and a tokenizer learned from the documents."""
    if not (folder / "tokenizer.json").is_file():
        texts = (document.text for document in iter_documents(str(arguments.data)))
        BpeTokenizer.train(texts, VOCAB).save(folder)
    if (folder / "config.json").is_file():
        return
    options = {
        "vocab_size": load_tokenizer(str(folder)).vocab_size,
        "hidden_size": arguments.width,
        # the usual 8/3 of the width, rounded up to whole blocks of 16
        "intermediate_size": -(-arguments.width * 8 // 48) * 16,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.heads,
        "head_dim": arguments.width // arguments.heads,
        "max_position_embeddings": 4096,
    }
    shape: ModelShape = (
        Qwen3Config(**options, architectures=["Qwen3ForCausalLM"])
        if arguments.qk_norm
        else LlamaConfig(**options, architectures=["LlamaForCausalLM"])
    )
    shape.save_pretrained(folder)


def runs(arguments: argparse.Namespace, shape: Path) -> dict[str, RunConfig]:
    """Return the runs, by name."""
    nothing = AttachConfig(segment_length=arguments.segment, xl_cache_length=arguments.xl_cache)
    knn = KnnMemoryConfig(
        layers=(arguments.memory_layer,), memory_size=MEMORY_SIZE, top_k=32, age_slope=0.5
    )
    memory = replace(nothing, knn=knn, normalize_qk=True)
    training = TrainingConfig(
        rows_per_device=arguments.rows, max_steps=arguments.steps, learning_rate=arguments.rate,
        warmup_steps=min(100, arguments.steps // 10), weight_decay=0.01, precision="bfloat16",
        gate_learning_rate_factor=arguments.start_gate_factor, save_every=arguments.save_every,
        log_every=50, seed=arguments.seed,
    )  # fmt: skip
    none = RunConfig(
        name="none",
        pretrained=PretrainedConfig(path=str(shape), memory=nothing, from_scratch=True),
        data=DataConfig(
            train=str(arguments.data), tokenizer=str(shape),
            max_document_tokens=arguments.document_tokens,
        ),
        training=training,
    )  # fmt: skip
    assert none.pretrained is not None
    made = {
        "none": none,
        "start": replace(none, name="start", pretrained=replace(none.pretrained, memory=memory)),
    }
    learned = PretrainedConfig(path=str(arguments.work / "none" / "model" / "model"), memory=memory)
    for name, (rate, gates) in {"further": (1.0, 1.0), **VARIATIONS}.items():
        made[name] = replace(
            none,
            name=name,
            pretrained=replace(learned, memory=nothing) if name == "further" else learned,
            training=replace(
                training, max_steps=max(1, round(SHARE * arguments.steps)), warmup_steps=10,
                learning_rate=rate * arguments.tune_rate, log_every=10, seed=arguments.seed + 1,
                gate_learning_rate_factor=gates * arguments.gate_factor,
            ),
        )  # fmt: skip
    return made


def learn(run: RunConfig, directory: Path) -> None:
    if not (directory / "result.json").is_file():
        # a run that was killed before its first checkpoint has left its config
        train(run, directory, resume=(directory / "config.json").is_file())


def measure(directory: Path, corpus: TokenizedCorpus, tokenizer: Path, **limits: Any) -> Any:
    """Measure a trained model, on a GPU if there is one, with each size that it can have."""
    model = load_attached(None, directory / "model")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (0,) if model.memory_config.knn is None else (0, OLDER_SIZE, MEMORY_SIZE)
    result: PerplexityResult = evaluate_perplexity(
        model, corpus, memory_sizes=limits.pop("memory_sizes", sizes),
        rows=len(corpus.lengths), tokenizer=load_tokenizer(str(tokenizer)), **limits,
    )  # fmt: skip
    return result


def make(run: RunConfig, arguments: argparse.Namespace, shape: Path) -> None:
    """Make one run and measure it."""
    directory, out = arguments.work / run.name, arguments.out / f"{run.name}.json"
    if out.is_file():
        if load_config(RunConfig, arguments.out / f"{run.name}.config.json") != run:
            msg = f"{out} is of other settings. Name another --out and --work."
            raise SystemExit(msg)
        return
    learn(run, directory)
    corpus = tokenize_corpus(str(arguments.validation), load_tokenizer(str(shape)))
    measured = measure(directory, corpus, shape, max_tokens_per_document=arguments.measured_tokens)
    save_config(run, arguments.out / f"{run.name}.config.json")
    shutil.copy(directory / "metrics.jsonl", arguments.out / f"{run.name}.metrics.jsonl")
    # last: it says that the run is done
    found = {
        "machine": machine_info(["transformers"]),
        "training": json.loads((directory / "result.json").read_text()),
        "evaluation": measured.to_dict(),
    }
    write_json(out, found)


def closed(found: dict[str, Any], tuned: str) -> dict[str, float]:
    """Return how much of the gap a tuned run has closed, and what short contexts lose."""

    def nats(name: str) -> float:
        return float(found[name]["evaluation"]["measurements"][-1]["nats_per_token"])

    def short(name: str) -> float:
        return float(found[name]["evaluation"]["measurements"][-1]["buckets"][0]["nats_per_token"])

    gap = nats("none") - nats("start")
    return {
        "nats_without_memory": nats("none"),
        "nats_without_memory_after_as_many_steps": nats("further"),
        "nats_with_memory_from_the_start": nats("start"),
        "nats_attached": nats(tuned),
        "share_of_the_gap_closed": (nats("none") - nats(tuned)) / gap,
        "share_of_the_gap_closed_beyond_further": (nats("further") - nats(tuned))
        / (nats("further") - nats("start")),
        "first_512_tokens_before": short("none"),
        "first_512_tokens_after": short(tuned),
    }


def summarize(out: Path) -> None:
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in RUNS}
    summary: dict[str, Any] = {"machine": found["none"]["machine"], "runs": found}
    summary["closed"] = closed(found, "tuned")
    summary["variations"] = {name: closed(found, name) for name in VARIATIONS}
    write_json(out / "summary.json", summary)
    print(json.dumps({name: summary[name] for name in ("closed", "variations")}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", choices=RUNS)
    parser.add_argument("--prepare", action="store_true", help="tokenize the documents, no more")
    arguments = parse(parser)
    shape = arguments.work / "shape"
    make_shape(shape, arguments)
    if arguments.prepare:
        for documents in (arguments.data, arguments.validation):
            tokenize_corpus(str(documents), load_tokenizer(str(shape)))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, run in runs(arguments, shape).items():
        if name in (arguments.runs or RUNS):
            make(run, arguments, shape)
    if arguments.runs is None:
        summarize(arguments.out)


if __name__ == "__main__":
    main()

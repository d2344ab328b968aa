"""Does memory help? Three small models with equal tokens: no cache, XL cache, XL cache and memory.

    python -m benchmarks.compare --data TRAIN --validation VALIDATION --out benchmarks/results/NAME

Training goes on where it stopped if the command is repeated. `--out` receives configs, logs,
results and plots; weights and checkpoints stay in `--work`.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import machine_info
from byheart.config import apply_overrides
from byheart.data.token_cache import tokenize_corpus
from byheart.data.tokenize import load_tokenizer
from byheart.evaluation.perplexity import evaluate_perplexity
from byheart.evaluation.plots import plot_loss_by_position, plot_perplexity, plot_training_curves
from byheart.evaluation.result import PerplexityResult
from byheart.models.checkpoint import load_model
from byheart.recipes import RECIPES
from byheart.training.config import RunConfig
from byheart.training.run import train

VARIANTS = ("none", "xl", "memory")
MEMORY_SIZES = (0, 2048, 8192, 32_768)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set-memory",
        action="append",
        default=[],
        help="a field of the kNN memory, for the variant that has one: memory_size=32768",
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    return parser.parse_args()


def configure(arguments: argparse.Namespace, variant: str, tokenizer: str) -> RunConfig:
    run = RECIPES[f"compare-{variant}"]()
    run = replace(
        run,
        data=replace(
            run.data,
            train=arguments.data,
            validation=arguments.validation,
            tokenizer=tokenizer,
        ),
        training=replace(run.training, seed=arguments.seed),
    )
    own = []
    if variant == "memory":
        own = [f"model.knn_memory.{setting}" for setting in arguments.set_memory]
    return apply_overrides(run, [*arguments.overrides, *own])


def train_variant(run: RunConfig, directory: Path) -> None:
    if not (directory / "result.json").is_file():
        train(run, directory, resume=any(directory.glob("checkpoint-*")))


def evaluate_variant(run: RunConfig, directory: Path, variant: str) -> PerplexityResult:
    tokenizer = load_tokenizer(str(directory / "tokenizer"))
    corpus = tokenize_corpus(run.data.validation, tokenizer)
    return evaluate_perplexity(
        load_model(directory / "model", tokenizer_fingerprint=tokenizer.fingerprint),
        corpus,
        memory_sizes=MEMORY_SIZES if variant == "memory" else (0,),
        rows=run.evaluation.rows,
        max_documents=run.evaluation.max_documents,
        max_tokens_per_document=run.evaluation.max_tokens,
        tokenizer=tokenizer,
    )


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, object] = {
        "command": "python -m benchmarks.compare " + " ".join(sys.argv[1:]),
        "machine": machine_info(),
        "seed": arguments.seed,
        "variants": {},
    }
    tokenizer = RECIPES["compare-none"]().data.tokenizer
    for variant in arguments.variants:
        directory = arguments.work / variant
        run = configure(arguments, variant, tokenizer)
        train_variant(run, directory)
        # all variants read the same tokens: the first one trains the tokenizer
        tokenizer = str(directory / "tokenizer")
        result = evaluate_variant(run, directory, variant)
        summary["variants"][variant] = {
            "training": json.loads((directory / "result.json").read_text()),
            "evaluation": result.to_dict(),
        }
        for name in ("config.json", "metrics.jsonl"):
            shutil.copy(directory / name, arguments.out / f"{variant}.{name}")
        if variant == "memory":
            plot_perplexity(result, arguments.out / "perplexity.png")
            plot_loss_by_position(result, arguments.out / "loss_by_position.png")
        (arguments.out / f"{variant}.md").write_text(result.to_markdown())
        (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
    logs = [arguments.out / f"{variant}.metrics.jsonl" for variant in arguments.variants]
    plot_training_curves(logs, list(arguments.variants), arguments.out / "training.png")


if __name__ == "__main__":
    main()

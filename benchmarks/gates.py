"""Which gate, rate and place of the queries learns fastest on a pretrained model?

    python -m benchmarks.gates --data TRAIN --validation VALIDATION --out DIRECTORY --work RUNS

Takes the model without memory that `benchmarks.finetune` has left in RUNS, puts a memory on it in
different ways, and fine-tunes each for 4 % of its steps, on the same segments in the same order.
Each way changes one thing of the first. Interrupted, the same command goes on. `--ways` names the
ways to try in this process, so that several processes can share the folders; the command without it
tries what is missing, and writes the summary.
"""

import argparse
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.finetune import MEMORY_SIZE, learn, measure, parse, runs
from benchmarks.harness import machine_info, write_json
from byheart.config import load_config, save_config
from byheart.data.corpus import TokenizedCorpus
from byheart.data.token_cache import tokenize_corpus
from byheart.data.tokenize import load_tokenizer
from byheart.memory.config import KnnMemoryConfig
from byheart.training.config import RunConfig

MAX_DOCUMENTS, MAX_TOKENS = 8, 8192
OUTCOME, WAY = "outcome.json", "way.json"


def ways(tuned: RunConfig, num_layers: int) -> dict[str, RunConfig]:
    """Return the runs to compare, by name; the first is what the others change."""

    assert tuned.pretrained is not None
    before = tuned.pretrained
    assert before.memory.knn is not None
    first = before.memory.knn

    def change(*, factor: float | None = None, **memory: Any) -> RunConfig:
        pretrained = replace(before, memory=replace(before.memory, **memory))
        training = tuned.training
        if factor is not None:
            training = replace(training, gate_learning_rate_factor=factor)
        return replace(tuned, pretrained=pretrained, training=training)

    def knn(**changes: Any) -> KnnMemoryConfig:
        return replace(first, **changes)

    return {
        "tanh gate": change(),
        f"layer {num_layers // 2} of {num_layers}": change(knn=knn(layers=(num_layers // 2 - 1,))),
        f"layer {num_layers - 1} of {num_layers}": change(knn=knn(layers=(num_layers - 2,))),
        "keys as the model has them": change(normalize_qk=False),
        "queries at the window's end": change(memory_position="window"),
        "queries at their own place": change(memory_position="local"),
        "joint softmax": change(knn=knn(combine="joint")),
        "content gate": change(knn=knn(combine="content_gate")),
        "linear gate": change(gate="linear"),
        "sigmoid gate from -3": change(gate="sigmoid", gate_init=-3.0),
        "sigmoid gate from 0": change(gate="sigmoid"),
        "gates at the model's own rate": change(factor=1.0),
        "gates at 30 times the rate": change(factor=30.0),
        "gates at 100 times the rate": change(factor=100.0),
        "first scale of 20 instead of 10": change(scale_init=20.0),
        "first scale of 40 instead of 10": change(scale_init=40.0),
        "no age slope": change(knn=knn(age_slope=0.0)),
    }


def try_way(run: RunConfig, directory: Path, corpus: TokenizedCorpus, shape: Path) -> None:
    """Fine-tune and measure, and leave what came of it in the folder."""
    learn(run, directory)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    last = losses[-len(losses) // 4 :]
    measured = measure(
        directory, corpus, shape, memory_sizes=(0, MEMORY_SIZE),
        max_documents=MAX_DOCUMENTS, max_tokens_per_document=MAX_TOKENS,
    )  # fmt: skip
    without, with_memory = (m.nats_per_token for m in measured.measurements)
    outcome = {
        "steps": run.training.max_steps,
        "loss_of_the_last_fourth": sum(last) / len(last),
        "nats_without_memory": without,
        "nats_with_memory": with_memory,
    }
    save_config(run, directory / WAY)
    # last: it says that the way was tried
    write_json(directory / OUTCOME, outcome)
    print(f"{run.name}: {without:.4f} {with_memory:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", help="Only these, by name, and no summary.")
    arguments = parse(parser)
    shape = arguments.work / "shape"
    named = ways(runs(arguments, shape)["tuned"], arguments.layers)
    if unknown := set(arguments.ways or ()) - set(named):
        parser.error(f"--ways must be among {sorted(named)}, got {sorted(unknown)}.")
    corpus = tokenize_corpus(str(arguments.validation), load_tokenizer(str(shape)))
    found = {}
    for name in arguments.ways or named:
        file = re.sub(r"\W+", "-", name)
        directory, run = arguments.work / "gates" / file, replace(named[name], name=name)
        if not (directory / OUTCOME).is_file():
            try_way(run, directory, corpus, shape)
        if load_config(RunConfig, directory / WAY) != run:
            msg = f"{directory} is of other settings. Name another --work."
            raise SystemExit(msg)
        found[name] = json.loads((directory / OUTCOME).read_text(encoding="utf-8"))
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_config(run, arguments.out / f"{file}.config.json")
        shutil.copy(directory / "metrics.jsonl", arguments.out / f"{file}.metrics.jsonl")
    if arguments.ways is None:
        none = json.loads((arguments.work / "none" / "result.json").read_text(encoding="utf-8"))
        summary = {"machine": machine_info(["transformers"]), "none": none, "ways": found}
        write_json(arguments.out / "summary.json", summary)


if __name__ == "__main__":
    main()

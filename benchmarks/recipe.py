"""What does each part of the recipes of the tasks bring?

    python -m benchmarks.recipe --task reason --out benchmarks/results/recipe-reason.json

Trains the recipe and variants of it that change one part each, on documents of up to `SEGMENTS`
segments and for `CONTINUE_STEPS` after that, with equal seeds and documents. Says after how many
steps each stage was reached, and how many documents of each length are answered right in the end,
also of lengths that were never trained on. A stage that takes longer than `STAGE_STEPS` is given
up. What is done is kept in `--work`: interrupted, the same command goes on. Several processes can
share it, each with its own `--variants`; the command without them then writes what all have found.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import machine_info
from byheart.config import apply_overrides, write_text_atomic
from byheart.errors import CheckpointError
from byheart.recipes import TASK_RECIPES
from byheart.training.checkpoint import find_checkpoint
from byheart.training.task_run import train_task

SEGMENTS = {"reason": 1, "detect": 4, "memorize": 4}
STAGE_STEPS = {"reason": 2000, "detect": 1000, "memorize": 1000}
CONTINUE_STEPS = {"reason": 0, "detect": 200, "memorize": 200}
LENGTHS = {"reason": (1, 2), "detect": (4, 16, 64, 256), "memorize": (4, 16, 64, 256)}
"""Segments of the documents that are measured in the end."""
SAMPLES = 200
"""Documents of each length."""
OUTCOME = "outcome.json"
OF_STAGES = {
    "BERT": ["encoder.architecture=bert"],
    "documents of the stage's length alone": ["curriculum.lengths=stage"],
    "the same rate in all stages": ["training.length_decay=0"],
}
SHARED = {
    "weights themselves, no running average": ["training.average_decay=0"],
    "no weight decay": ["training.weight_decay=0"],
}
VARIANTS: dict[str, dict[str, list[str]]] = {
    "reason": {
        "the recipe": [],
        "no local layers": ["encoder.num_local_layers=0"],
        "one question about each document": ["task.num_questions=1"],
        "documents fill their segments": ["task.any_length=false"],
        "answer from [CLS]": ["encoder.pooling=cls"],
        "first weights of 0.02": ["encoder.init_std=0.02"],
        "no lesson": ["curriculum.lessons=false"],
        "fragments of facts in the background": ["task.fragments=2"],
        **SHARED,
    },
    "detect": {
        "the recipe": [],
        "local layers, as in reason": ["encoder.num_local_layers=2"],
        **OF_STAGES,
        "no gates": [
            "memory.update=replace", "memory.gate_bias_init=-2.0", "training.write_cost=0",
        ],
        "no cost of writing": ["training.write_cost=0"],
        "no burn-in": ["curriculum.burn_in_segments=0"],
        "noise of 0.3 on the memory": ["memory.noise=0.3"],
        "no fragments of facts in the background": ["task.fragments=0"],
        "no namesakes in the background": ["task.namesakes=0"],
        "31 stories instead of 118": ["task.more_stories=false"],
        "strangers in the background": ["task.strangers=0.5"],
        **SHARED,
    },
    "memorize": {
        "the recipe": [],
        **OF_STAGES,
        "no steps after the last stage": ["curriculum.continue_steps=0"],
        "gates, cost and burn-in, as in detect": [
            "memory.update=gated", "memory.gate_bias_init=2.0", "training.write_cost=0.3",
            "curriculum.burn_in_segments=1024",
        ],
        "noise of 0.3 on the memory": ["memory.noise=0.3"],
        "no fragments of facts in the background": ["task.fragments=0"],
        "118 stories instead of 31": ["task.more_stories=true"],
        **SHARED,
    },
}  # fmt: skip


def learn(
    task: str, changes: Iterable[str], seed: int, directory: Path, overrides: Iterable[str]
) -> None:
    run = apply_overrides(
        TASK_RECIPES[f"rmt-{task}"](),
        [
            f"training.seed={seed}",
            f"curriculum.max_segments={SEGMENTS[task]}",
            f"curriculum.stage_steps={STAGE_STEPS[task]}",
            f"curriculum.continue_steps={CONTINUE_STEPS[task]}",
            f"evaluation.segments={list(LENGTHS[task])}",
            f"evaluation.samples={SAMPLES}",
            *overrides,
            *changes,
        ],
    )
    try:
        begun = find_checkpoint(directory).step > 0
    except CheckpointError:
        begun = False
    result = train_task(run, directory, resume=begun, overwrite=not begun)
    outcome = {
        "changes": list(changes),
        "outcome": result.outcome,
        "steps": result.steps,
        "accuracy": {
            str(found.num_segments): found.accuracy for found in result.evaluation.measurements
        },
        "reached": [
            {"stage": "lesson" if e.lesson else e.num_segments, "step": e.step}
            for e in result.curriculum.reached
        ],
        "evaluations": result.curriculum.to_list(),
    }
    write_text_atomic(directory / OUTCOME, json.dumps(outcome, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=sorted(VARIANTS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs", "recipe"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="*", help="Only these, by name.")
    parser.add_argument("--set", nargs="*", default=[], help="Fields of the recipe, for all.")
    arguments = parser.parse_args()
    task, variants = arguments.task, VARIANTS[arguments.task]
    if unknown := set(arguments.variants or ()) - set(variants):
        parser.error(f"--variants must be among {sorted(variants)}, got {sorted(unknown)}.")
    # settings decide the folder, so that nothing is resumed or reported that had others
    settings_hash = hashlib.sha256(json.dumps(sorted(arguments.set)).encode()).hexdigest()[:8]
    folder = arguments.work / f"{task}-seed-{arguments.seed}-{settings_hash}"
    directories = {name: folder / re.sub(r"[^\w.-]+", "-", name) for name in variants}
    for name in arguments.variants or variants:
        if not (directories[name] / OUTCOME).is_file():
            learn(task, variants[name], arguments.seed, directories[name], arguments.set)
        found = {
            known: json.loads((directory / OUTCOME).read_text(encoding="utf-8"))
            for known, directory in directories.items()
            if (directory / OUTCOME).is_file()
        }
        settings = {
            "task": task, "seed": arguments.seed, "set": arguments.set,
            "stage_steps": STAGE_STEPS[task], "continue_steps": CONTINUE_STEPS[task],
            "samples": SAMPLES,
        }  # fmt: skip
        content = {
            "machine": machine_info(["transformers"]), "settings": settings, "results": found,
        }  # fmt: skip
        write_text_atomic(arguments.out, json.dumps(content, indent=2) + "\n")
        print(f"{name}: {found[name]['outcome']}, {found[name]['reached']}", flush=True)


if __name__ == "__main__":
    main()

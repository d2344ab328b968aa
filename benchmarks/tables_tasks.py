"""Sections of benchmarks/README.md about the tasks of the Recurrent Memory Transformer report."""

from typing import Any

from benchmarks.table import HERE, machine_line, read, table


def task_section(task: str) -> str | None:
    result = read(f"{task}/{task}.json")
    if result is None:
        return None
    made = result["made_by"]
    curriculum = (read(f"{task}/seed-0/config.json") or {})["curriculum"]
    longer, before = (curriculum.get(f"{name}_segments") for name in ("continue", "burn_in"))
    more = f", then up to {longer}" if longer else ""
    if before:
        more += f", at last half of them behind up to {before:,} that are read without a gradient"
    note = HERE / "results" / task / "note.md"
    versions = ", ".join(f"{name} {v}" for name, v in made["versions"].items())
    return "\n\n".join(
        [
            f"## Recurrent memory: {task}",
            "An encoder of 0.9M parameters from scratch, windows of 64 tokens of which 51 are "
            "text, 10 memory tokens, trained on documents of 1 to "
            f"{curriculum['max_segments']} segments{more}; "
            "held-out facts in held-out stories. The report's column is a pretrained BERT with "
            "segments of 499 tokens, trained on 1 to 7 (Bulatov et al. 2023, Figure 1). Memory is "
            "the peak of the process that measured a length, speed what it had of the cores: "
            "lengths were measured in several processes, so neither is a curve over the lengths "
            "(that is in *Recurrent memory: peak memory and time* above).",
            (HERE / "results" / task / f"{task}.md").read_text(encoding="utf-8").strip(),
            *(f"Seed {seed}: {outcome}" for seed, outcome in enumerate(result["outcomes"])),
            *([note.read_text(encoding="utf-8").strip()] if note.is_file() else []),
            f"`{made['command']}` on {made['cores']} cores of {made['processor']}; {versions}.",
        ]
    )


def flops_section() -> str:
    folder = HERE / "results" / "flops"
    return "\n\n".join(
        [
            "## FLOPs of full attention and recurrent memory",
            "Counted, not measured (Bulatov et al. 2023, Figure 3): "
            "`byheart reproduce flops --out benchmarks/results/flops`.",
            "![FLOPs](results/flops/flops.png)",
            (folder / "flops.md").read_text(encoding="utf-8").strip(),
        ]
    )


def generalization_section(name: str, what: str) -> str | None:
    result = read(f"{name}/memorize.json")
    if result is None:
        return None
    folder = HERE / "results" / name
    made = result["made_by"]
    versions = ", ".join(f"{name} {v}" for name, v in made["versions"].items())
    return "\n\n".join(
        [
            f"## Recurrent memory: every stage of memorize on every length{what}",
            "The small encoder of the tables above after each stage of its curriculum (Bulatov et "
            "al. 2023, Figure 5, where each is a BERT with segments of 499 tokens).",
            f"![accuracy](results/{name}/memorize.png)",
            (folder / "memorize.md").read_text(encoding="utf-8").strip(),
            f"`{made['command']}` on {made['cores']} cores of {made['processor']}; {versions}.",
        ]
    )


def pretrained_section(name: str, place: str) -> str | None:
    result = read(f"{name}/seed-0/result.json")
    if result is None:
        return None
    note = HERE / "results" / name / "note.md"
    rows = [
        [
            f"{row['num_segments']:,}",
            f"{row['num_tokens'] // row['num_samples']:,}",
            f"{row['accuracy']:.2%}",
            f"{row['interval'][0]:.1%} to {row['interval'][1]:.1%}",
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in result["evaluation"]["measurements"]
    ]
    return "\n\n".join(
        [
            f"## Recurrent memory on a pretrained encoder, on a {place}: memorize",
            note.read_text(encoding="utf-8").strip(),
            table(["segments", "tokens", "accuracy", "95 % interval", "tokens per second"], rows),
            result["summary"],
        ]
    )


def recipe_section(task: str) -> str | None:
    result = read(f"recipe-{task}.json")
    if result is None:
        return None
    settings, results = result["settings"], result["results"]
    lengths = list(next(iter(results.values()))["accuracy"])
    measured = [f"{length} segments" for length in lengths]
    rows = [
        [name, _reached(row), *(f"{row['accuracy'][length]:.1%}" for length in lengths)]
        for name, row in results.items()
    ]
    return "\n\n".join(
        [
            f"## What each part of the recipe of {task} brings",
            f"Each row changes one thing of the recipe{_changed(settings['set'])}; seed "
            f"{settings['seed']}. A stage is given "
            f"up after {settings['stage_steps']:,} steps; {settings['continue_steps']:,} more "
            f"follow the last. Accuracy: on {settings['samples']:,} held-out documents of so many "
            "segments.",
            table(["recipe", "stages reached after steps", *measured], rows),
            machine_line(result["machine"]),
        ]
    )


def _changed(overrides: list[str]) -> str:
    return f" with `{'`, `'.join(overrides)}`" if overrides else ""


def _reached(row: dict[str, Any]) -> str:
    stages = [f"{stage['stage']}: {stage['step']:,}" for stage in row["reached"]]
    return ", ".join(stages) or "none"

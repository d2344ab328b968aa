"""The runs whose results are published can be read by what there is today."""

from pathlib import Path

import pytest

from byheart.config import load_config
from byheart.training.config import RunConfig
from byheart.training.task_config import TaskRunConfig
from byheart.training.task_files import load_task_run

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*/*.config.json")), ids=lambda path: path.relative_to(RESULTS)
)
def test_configs_of_language_models_can_be_read(path):
    run = load_config(RunConfig, path)
    assert run.model is not None or run.pretrained is not None


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*/seed-*/config.json")), ids=lambda path: path.relative_to(RESULTS)
)
def test_runs_of_tasks_can_be_read(path):
    run = load_config(TaskRunConfig, path)
    if (path.parent / "model").is_dir():
        assert load_task_run(path.parent).run == run

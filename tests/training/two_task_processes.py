"""One of two processes that learn a task together."""

import sys
from pathlib import Path

from task_setup import task_run

from byheart.training.task_run import train_task

if __name__ == "__main__":
    run = task_run(training={"rows_per_device": 2}, encoder={"dropout": 0.0}, memory={"noise": 0.0})
    train_task(run, Path(sys.argv[1]))

"""One process of a run of several, started by torchrun: it is stopped in the middle and goes on."""

import argparse
import signal
import warnings
from pathlib import Path

from training_setup import run_config

from byheart.training.callbacks import TrainEvent
from byheart.training.run import train
from byheart.training.stop import TrainingInterruptedError


def main() -> None:
    warnings.simplefilter("error")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    run = run_config(
        folder, rows_per_device=1, accumulation_steps=2, max_steps=9, log_every=2, evaluate_every=4
    )

    def stop_one_process(event: TrainEvent) -> None:
        # events come in the main process only, so the other one must learn of it
        if event.kind == "log" and event.step == 4:
            signal.raise_signal(signal.SIGTERM)

    try:
        train(run, folder / "two", on_event=stop_one_process)
    except TrainingInterruptedError:
        train(run, folder / "two", resume=True)
        (folder / "was_stopped").touch()


if __name__ == "__main__":
    main()

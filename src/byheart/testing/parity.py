"""Compare byheart with what the authors' own code computed: `python -m byheart.testing.parity`.

A file `mt_layer_*.npz` is a recording of a memory layer of the Memorizing Transformer
(`byheart.testing.parity_layer`), a directory one of a Recurrent Memory Transformer
(`byheart.testing.parity_recurrent`).
"""

import argparse
import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from byheart.errors import DataError
from byheart.testing.parity_layer import layer_difference
from byheart.testing.parity_recurrent import recurrent_differences

TOLERANCE = 1e-5
"""Largest difference that counts as agreement: both are float32, and sum in other orders."""


def differences(path: str | PathLike[str]) -> dict[str, float]:
    """Run whatever a path holds a recording of.

    Args:
        path: A recording.

    Returns:
        The largest absolute difference to byheart's results, for each thing that was recorded.

    Raises:
        DataError: If it is no recording that this version knows.
    """
    if Path(path).is_dir():
        return recurrent_differences(path)
    return {"layer outputs": layer_difference(path)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the named recordings and write one line for each thing recorded.

    Args:
        arguments: Command line; `None` for the process's own.

    Returns:
        Exit code: 0 if all agree, 1 if one differs or cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m byheart.testing.parity",
        description="Compare byheart with recordings of the authors' own code.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="recordings: files mt_layer_*.npz, directories"
    )
    all_agree = True
    for path in parser.parse_args(arguments).paths:
        try:
            found = differences(path)
        except DataError as error:
            sys.stderr.write(f"{error}\n")
            all_agree = False
            continue
        for name, largest in found.items():
            # NaN differs
            agrees = largest <= TOLERANCE
            verdict = "agrees" if agrees else f"DIFFERS, by more than {TOLERANCE:g}"
            sys.stdout.write(f"{path}: {name}: largest difference {largest:.1e}, {verdict}\n")
            all_agree = all_agree and agrees
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())

"""A small real corpus that comes with byheart, for the demo and for first steps."""

from importlib import resources
from pathlib import Path
from typing import Literal

from byheart.errors import DataError

__all__ = ["sample_path"]


def sample_path(split: Literal["train", "validation"]) -> Path:
    """Tell where the sample corpus lies: source code of the Python standard library.

    `README.md` beside it says how it was made, `LICENSE.txt` under which terms it may be passed on.

    Args:
        split: Which documents; no document is in both.

    Returns:
        A JSON lines file that `iter_documents` and `tokenize_corpus` read.

    Raises:
        ValueError: If there is no such split.
        DataError: If byheart was installed without the file.
    """
    if split not in ("train", "validation"):
        msg = f"split must be 'train' or 'validation', got {split!r}."
        raise ValueError(msg)
    path = Path(str(resources.files(__name__) / f"{split}.jsonl.xz"))
    if not path.is_file():
        msg = f"The sample corpus must lie at {path}, and does not. Install byheart again."
        raise DataError(msg)
    return path

"""Build the sample corpus from the standard library of the running interpreter.

    python -m byheart.data.sample.build FOLDER

A document is a top-level package or module with all its source files in path order, each after a
line with its path. Tests, generated tables and documents of less than 30 KB are left out.
"""

import json
import lzma
import shutil
import sys
import sysconfig
from pathlib import Path

__all__ = ["build"]

_MIN_BYTES = 30_000
_LEFT_OUT = {
    # tests and their data
    "test", "tests", "idle_test",
    # no part of the library: other people's packages, build results
    "site-packages", "ensurepip", "lib-dynload", "__pycache__",
    # generated from tables or from the manual
    "encodings", "pydoc_data",
    # drawings, not a library
    "turtledemo",
}  # fmt: skip
# chosen by hand: long and short ones that no training document repeats
_VALIDATION = {"email", "argparse", "datetime", "json", "logging", "shutil", "tarfile", "urllib"}


def build(folder: Path) -> None:
    """Write `train.jsonl.xz`, `validation.jsonl.xz` and `LICENSE.txt`.

    Args:
        folder: Where to write them; made if missing.
    """
    library = Path(sysconfig.get_path("stdlib"))
    version = ".".join(str(part) for part in sys.version_info[:3])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library / "LICENSE.txt", folder / "LICENSE.txt")
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    for name, text in _documents(library).items():
        if len(text.encode("utf-8")) < _MIN_BYTES:
            continue
        record = {"id": name, "source": f"Python {version} Lib/{name}", "text": text}
        split = "validation" if name in _VALIDATION else "train"
        lines[split].append(json.dumps(record, ensure_ascii=False) + "\n")
    for split, records in lines.items():
        packed = lzma.compress("".join(records).encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)
        (folder / f"{split}.jsonl.xz").write_bytes(packed)


def _documents(library: Path) -> dict[str, str]:
    texts: dict[str, list[str]] = {}
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        place = path.relative_to(library)
        # config-3.x and _sysconfigdata describe the machine that built the interpreter
        is_build = place.parts[0].startswith("config-") or place.stem.startswith("_sysconfigdata")
        if is_build or _LEFT_OUT.intersection(place.parts):
            continue
        text = path.read_text(encoding="utf-8")
        name = place.parts[0].removesuffix(".py")
        texts.setdefault(name, []).append(f"# ==== {place.as_posix()}\n{text}")
    return {name: "".join(parts) for name, parts in texts.items()}


if __name__ == "__main__":
    build(Path(sys.argv[1]))

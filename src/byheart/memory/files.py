"""Directories that are either complete or not there: tensors in safetensors, a manifest last."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from byheart.errors import CheckpointError

MANIFEST = "manifest.json"
_TENSORS = "tensors.safetensors"
_PIECE_BYTES = 16 << 20


def checksum(path: Path) -> str:
    """Hash a file.

    Returns:
        SHA-256 of its content, hexadecimal.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Declare a directory complete: list its files with size and checksum, as the last write.

    Args:
        directory: The directory; everything in it is already written.
        content: JSON-able facts to keep beside the list.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    listed = {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": checksum(path),
        }
        for path in files
        if path.name != MANIFEST
    }
    for path in files:
        _sync(path)
    temporary = directory / f"{MANIFEST}.partial"
    temporary.write_text(json.dumps({**content, "files": listed}, indent=2), encoding="utf-8")
    _sync(temporary)
    temporary.replace(directory / MANIFEST)
    _sync(directory)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a directory and check its files against it.

    Returns:
        The manifest.

    Raises:
        CheckpointError: If the directory is incomplete or a file was changed.
    """
    path = directory / MANIFEST
    if not path.is_file():
        msg = (
            f"{directory} is not complete: it has no {MANIFEST}. It was cut short while saving, or "
            "byheart has not written it."
        )
        raise CheckpointError(msg)
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = [
            (name, facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path} is not a manifest that byheart wrote ({error}). Use another checkpoint."
        raise CheckpointError(msg) from error
    for name, num_bytes, sha256 in files:
        file = directory / name
        if not file.is_file() or file.stat().st_size != num_bytes:
            size = file.stat().st_size if file.is_file() else 0
            what = "cut short" if size < num_bytes else "changed after it was saved"
            msg = f"{file} must have {num_bytes} bytes, found {size or 'no'}. It was {what}."
            raise CheckpointError(msg)
        if checksum(file) != sha256:
            msg = f"{file} was changed after it was saved: its checksum differs."
            raise CheckpointError(msg)
    return manifest


def require_format(
    manifest: Mapping[str, Any], directory: str | Path, name: str, version: int
) -> None:
    """Refuse what another kind of thing, or another version of byheart, has written.

    Args:
        manifest: The directory's manifest.
        directory: Where it is, for the message.
        name: Name of the format that is wanted.
        version: Its version.

    Raises:
        CheckpointError: If either differs.
    """
    found = (manifest.get("format"), manifest.get("format_version"))
    if found != (name, version):
        msg = (
            f"{directory} must be a {name} of version {version}, found {found[0]} of version "
            f"{found[1]}. Load it with the byheart version that wrote it."
        )
        raise CheckpointError(msg)


@contextmanager
def complete_directory(directory: Path, content: Mapping[str, Any]) -> Iterator[Path]:
    """Write a new directory, replacing an older one only when it is complete.

    Args:
        directory: Where it shall be.
        content: JSON-able facts for the manifest.

    Yields:
        A directory to write into. If that raises, nothing has changed.

    Raises:
        CheckpointError: If tensors could not be written, or the older directory holds what byheart
            has not written there, or the process works in it.
    """
    # the directory is replaced, not a link to it
    directory = directory.resolve()
    _require_not_inside(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover(directory)
    _require_replaceable(directory, content.get("format"))
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        write_manifest(partial, content)
        # something may have come while this was written
        _require_replaceable(directory, content.get("format"))
        _replace(partial, directory)
    except SafetensorError as error:
        msg = (
            f"{directory} could not be written: {error}. See that the disk has room; what was "
            "there before is unchanged."
        )
        raise CheckpointError(msg) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_not_inside(directory: Path) -> None:
    """Refuse to replace the directory in which the process would stand, and then be nowhere.

    Raises:
        CheckpointError: If it is.
    """
    current = Path.cwd()
    if directory in (current, *current.parents):
        msg = (
            f"{directory} must not be the working directory, or hold it, because it would be "
            "replaced as a whole. Save to a directory inside of it."
        )
        raise CheckpointError(msg)


def _require_replaceable(directory: Path, name: str | None) -> None:
    """Refuse to replace a directory with files that a save of the same format has not written.

    Raises:
        CheckpointError: If there is one, or a file in place of the directory.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        msg = f"{directory} must be a directory, found a file. Save to another place."
        raise CheckpointError(msg)
    written = _written_files(directory, name)
    for path in sorted(directory.rglob("*")):
        is_inside = path.is_dir() and not path.is_symlink()
        if not is_inside and path not in written:
            msg = (
                f"{directory} would be replaced as a whole, but it holds "
                f"{path.relative_to(directory)}, which is not part of a {name or 'checkpoint'} "
                "that byheart has written there. Save to a new directory, or move it away."
            )
            raise CheckpointError(msg)


def _written_files(directory: Path, name: str | None) -> set[Path]:
    """Return the files that a directory's manifest accounts for, if it is of a format."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != name:
            return set()
        listed = {directory / path for path in manifest["files"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    # manifests of directories inside are not listed
    return listed | {path.parent / MANIFEST for path in listed} | {directory / MANIFEST}


def recover(directory: Path) -> None:
    """Tidy up after a process that was killed while it replaced a directory.

    Between the two renames neither the old nor the new directory has its name. The new one is
    complete then, and takes it. Other left-overs of dead processes are removed.

    Args:
        directory: The directory by its name.
    """
    directory = directory.resolve()
    name = glob.escape(directory.name)
    left = [
        path for path in directory.parent.glob(f".{name}.partial-*") if not _is_alive(path.name)
    ]
    old = directory.with_name(f".{directory.name}.old")
    if not directory.exists():
        complete = [path for path in left if (path / MANIFEST).is_file()]
        found = max(complete, key=lambda path: path.stat().st_mtime, default=old)
        if found.exists():
            found.rename(directory)
    for path in (*left, old):
        shutil.rmtree(path, ignore_errors=True)


def _is_alive(partial_name: str) -> bool:
    """Say whether the process that writes a partial directory still runs.

    Returns:
        `True` also for this process, whose own partial directory is made anew.
    """
    process = partial_name.rpartition("-")[2]
    if not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def save_directory(
    directory: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]
) -> None:
    """Write tensors and facts as a new directory, replacing an older one only when complete.

    Args:
        directory: Where to.
        tensors: What to keep.
        content: JSON-able facts for the manifest.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with complete_directory(directory, content) as partial:
        save_file(contiguous, partial / _TENSORS)


def _replace(new: Path, target: Path) -> None:
    """Rename a complete directory into place; `recover` mends a crash in between."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def load_directory(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_directory` wrote.

    Returns:
        Tensors and manifest.

    Raises:
        CheckpointError: If the directory is incomplete or damaged.
    """
    recover(directory)
    if not directory.exists():
        msg = f"There is no directory {directory}. Check the path."
        raise CheckpointError(msg)
    manifest = read_manifest(directory)
    try:
        return load_file(directory / _TENSORS), manifest
    except (SafetensorError, OSError) as error:
        msg = f"{directory / _TENSORS} cannot be read: {error}."
        raise CheckpointError(msg) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

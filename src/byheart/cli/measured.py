"""Measurements that are kept as they are made, so that an interruption loses none."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byheart.config import write_text_atomic
from byheart.errors import CheckpointError

if TYPE_CHECKING:
    from byheart.evaluation.segments_result import SegmentsResult


def measure_once(
    file: Path,
    settings: Mapping[str, object],
    lengths: Sequence[int],
    measure: Callable[[int], "SegmentsResult"],
) -> "SegmentsResult":
    """Measure a model at some lengths, but for those where it was measured before.

    Args:
        file: Where the result is kept; it is written after each length. What was measured of the
            same model with other settings stays in it.
        settings: What the result depends on, with the `model_fingerprint`.
        lengths: Numbers of segments.
        measure: Called with each length that is not there with these settings.

    Returns:
        Accuracy by length.

    Raises:
        CheckpointError: If the file is damaged.
    """
    from byheart.evaluation.segments_result import SegmentsResult

    known, others = _measured_before(file, settings)
    for length in lengths:
        if length in known:
            continue
        known[length] = measure(length)
        content: dict[str, object] = {
            "settings": settings,
            "result": SegmentsResult.joined([known[one] for one in sorted(known)]).to_dict(),
        }
        if others:
            content["others"] = others
        write_text_atomic(file, json.dumps(content, indent=2) + "\n")
    return SegmentsResult.joined([known[length] for length in lengths])


def _measured_before(
    file: Path, settings: Mapping[str, object]
) -> "tuple[dict[int, SegmentsResult], list[Any]]":
    """Read what was measured with these settings, and of the same model with others.

    Returns:
        Results by length, and the others as they are in the file.
    """
    from byheart.evaluation.segments_result import SegmentsResult

    if not file.is_file():
        return {}, []
    known: dict[int, SegmentsResult] = {}
    others = []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        later = content.pop("others", [])
        for entry in (content, *later):
            result = SegmentsResult.from_dict(entry["result"])
            if entry["settings"] == settings:
                known = result.by_length()
            elif entry["settings"]["model_fingerprint"] == settings["model_fingerprint"]:
                others.append(entry)
    # whatever else the file may hold
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        msg = (
            f"{file} must hold what was measured before, and does not ({error!r}). Remove it to "
            "measure again."
        )
        raise CheckpointError(msg) from error
    return known, others

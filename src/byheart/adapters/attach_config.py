"""How memory is put on a pretrained decoder."""

import operator
from dataclasses import dataclass, fields, replace
from typing import Literal

from byheart.choices import require_choices, require_finite
from byheart.memory.config import KnnMemoryConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AttachConfig:
    """A kNN memory in chosen layers and an XL cache in all layers of a pretrained decoder.

    Without either, documents are read in segments that know nothing of each other: what a memory is
    compared with.
    """

    knn: KnnMemoryConfig | None = None
    """The kNN memory; `None` for none. Its layers may count from the end: -1 is the last."""
    xl_cache_length: int = 0
    """Previous tokens whose keys and values every layer keeps."""
    segment_length: int = 512
    """Tokens after which a segment is complete and enters memory."""
    memory_position: Literal["none", "window", "local"] = "none"
    """Where queries stand when they search the memory, whose keys stand at 0: keys and queries
    without positions; all queries at `segment_length`; queries at their place in the segment.
    Models without rotary positions know only one way."""
    gate: Literal["tanh", "linear", "sigmoid"] = "tanh"
    """What makes a gate of a learned number. At `gate_init=0` the first two are closed, so that
    the model is what it was, and yet learn; a sigmoid is closed nowhere."""
    gate_init: float = 0.0
    """First value of the learned numbers, before the function. With `combine="joint"` it is added
    to the memory's scores, and no value closes the memory."""
    normalize_qk: bool = False
    """Search the memory with queries and keys of length 1 and a learned scale per head, as the
    paper does, instead of those that the model has."""
    scale_init: float | None = None
    """First factor of the memory's scores; `None` for the model's own, or 10 with
    `normalize_qk`."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_finite(self)
        if not (self.knn is None or isinstance(self.knn, KnnMemoryConfig)):
            msg = f"knn must be a KnnMemoryConfig or None, got {type(self.knn).__name__}."
            raise TypeError(msg)
        for name, least in (("xl_cache_length", 0), ("segment_length", 1)):
            value = getattr(self, name)
            try:
                whole = -1 if isinstance(value, bool) else operator.index(value)
            except TypeError:
                whole = -1
            if whole < least:
                msg = f"{name} must be a whole number of at least {least}, got {value}."
                raise ValueError(msg)
            # files hold plain numbers
            object.__setattr__(self, name, whole)
        if self.scale_init is not None and self.scale_init <= 0:
            msg = f"scale_init must be above 0, got {self.scale_init}. None takes the model's."
            raise ValueError(msg)

    @property
    def reach(self) -> int:
        """Most tokens that a token sees without the kNN memory: its segment and the XL cache."""
        return self.segment_length + self.xl_cache_length

    def require_effect(self) -> None:
        """Refuse what would be ignored: for options that somebody has just chosen.

        Raises:
            ValueError: If an option changes nothing.
        """
        if self.knn is None:
            ignored = ["memory_position", "gate", "gate_init", "normalize_qk", "scale_init"]
            why = "without a kNN memory. Pass knn"
        elif self.knn.combine == "joint":
            ignored = ["gate"]
            why = "with combine='joint', which has none. Use another"
        else:
            return
        defaults = {field.name: field.default for field in fields(self)}
        for name in ignored:
            if getattr(self, name) != defaults[name]:
                msg = f"{name} has no effect {why}, or leave it out; got {getattr(self, name)!r}."
                raise ValueError(msg)

    def resolve(self, num_layers: int) -> "AttachConfig":
        """Count the layers of the memory from the first.

        Args:
            num_layers: Layers of the model.

        Returns:
            The config.

        Raises:
            ValueError: If a layer is named twice.
        """
        if self.knn is None:
            return self
        layers = tuple(layer % num_layers for layer in self.knn.layers)
        if len(set(layers)) < len(layers):
            msg = (
                f"knn.layers must name each layer once, got {self.knn.layers}, which are {layers}. "
                "Leave the second name of a layer out."
            )
            raise ValueError(msg)
        return replace(self, knn=replace(self.knn, layers=layers))

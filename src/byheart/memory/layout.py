"""The shape of a model's memory: what must agree before a state may be used."""

from dataclasses import dataclass, fields

from byheart.errors import MemoryStateError
from byheart.memory.config import KnnMemoryConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLayout:
    """What a `MemoryState` is made for; derived from a model's config."""

    num_layers: int
    """Layers that keep an XL cache."""
    num_kv_heads: int
    """Key-value heads per layer."""
    head_dim: int
    """Width of a head."""
    segment_length: int
    """Tokens after which a segment is complete and enters memory."""
    xl_cache_length: int
    """Previous tokens whose keys and values every layer keeps."""
    knn_memory: KnnMemoryConfig | None = None
    """The kNN memory, if there is one."""
    empty_slots: str = "masked"
    """Whether empty slots are left out or count as zeros, see `DecoderConfig.empty_slots`."""
    unit_keys: bool = False
    """Whether keys get length 1 when they enter the kNN memory, for models whose own keys are of
    any length."""
    model_type: str | None = None
    """Kind of model whose keys it holds: `decoder`, or transformers' name of a family; `None` in
    states that were saved before it was kept."""

    def require_same(self, other: "MemoryLayout", what: str) -> None:
        """Refuse a state that was made for another model.

        The memory size may differ: a model can read a larger or smaller memory than it was
        trained with.

        Args:
            other: The layout that was met.
            what: What `other` describes, for the message.

        Raises:
            MemoryStateError: If any other field differs.
        """
        mine, theirs = self._comparable(), other._comparable()
        if self.model_type is None or other.model_type is None:
            theirs["model_type"] = mine["model_type"]
        differing = [name for name, value in mine.items() if theirs[name] != value]
        if differing:
            listed = ", ".join(f"{name} {theirs[name]} (not {mine[name]})" for name in differing)
            msg = (
                f"{what} was made for another model: it has {listed}. "
                "Start with new_state() of this model, or load the model that made it."
            )
            raise MemoryStateError(msg)

    def _comparable(self) -> dict[str, object]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        knn = values.pop("knn_memory")
        return {
            **values,
            "knn_memory.layers": () if knn is None else tuple(knn.layers),
            "knn_memory.write": None if knn is None else knn.write,
        }

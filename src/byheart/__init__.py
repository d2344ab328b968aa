"""Long memory for transformers."""

from typing import TYPE_CHECKING, Any

from byheart.errors import ByheartError, CheckpointError, DataError, MemoryStateError
from byheart.memory.config import KnnMemoryConfig
from byheart.memory.recurrent import RecurrentState
from byheart.memory.state import MemoryState
from byheart.models.checkpoint import load_model, save_model
from byheart.models.config import DecoderConfig, preset
from byheart.models.decoder import Decoder, DecoderOutput
from byheart.models.fingerprint import model_fingerprint
from byheart.models.generate import SamplingConfig, generate
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.streaming import read_tokens

if TYPE_CHECKING:
    from byheart.adapters.attach import attach
    from byheart.adapters.memory_model import MemoryModel
    from byheart.adapters.recurrent import RecurrentMemory

__version__ = "0.1.0"

__all__ = [
    "ByheartError",
    "CheckpointError",
    "DataError",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "KnnMemoryConfig",
    "MemoryModel",
    "MemoryState",
    "MemoryStateError",
    "RecurrentMemory",
    "RecurrentMemoryConfig",
    "RecurrentState",
    "SamplingConfig",
    "attach",
    "generate",
    "load_model",
    "model_fingerprint",
    "preset",
    "read_tokens",
    "save_model",
]


def __getattr__(name: str) -> Any:
    # these need transformers, which takes seconds to import
    if name == "RecurrentMemory":
        from byheart.adapters.recurrent import RecurrentMemory

        return RecurrentMemory
    if name == "attach":
        from byheart.adapters.attach import attach

        return attach
    if name == "MemoryModel":
        from byheart.adapters.memory_model import MemoryModel

        return MemoryModel
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)

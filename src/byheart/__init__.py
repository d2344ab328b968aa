"""Long memory for transformers."""

from byheart.errors import ByheartError, CheckpointError, DataError, MemoryStateError
from byheart.memory.config import KnnMemoryConfig
from byheart.memory.state import MemoryState
from byheart.models.checkpoint import load_model, save_model
from byheart.models.config import DecoderConfig, preset
from byheart.models.decoder import Decoder, DecoderOutput
from byheart.models.fingerprint import model_fingerprint
from byheart.models.generate import SamplingConfig, generate
from byheart.models.streaming import read_tokens

__version__ = "0.1.0"

__all__ = [
    "ByheartError",
    "CheckpointError",
    "DataError",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "KnnMemoryConfig",
    "MemoryState",
    "MemoryStateError",
    "SamplingConfig",
    "generate",
    "load_model",
    "model_fingerprint",
    "preset",
    "read_tokens",
    "save_model",
]

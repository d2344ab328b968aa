"""Exceptions that callers may want to catch by type.

Everything else byheart raises is a built-in: `ValueError` for a bad value, `TypeError` for a bad
type, `ImportError` for a missing extra.
"""


class ByheartError(Exception):
    """Base of the exceptions below."""


class MemoryStateError(ByheartError, RuntimeError):
    """A memory state does not fit the model, or was used after it had been committed."""


class CheckpointError(ByheartError, RuntimeError):
    """A checkpoint or memory file is incomplete, damaged or belongs to something else."""


class DataError(ByheartError, ValueError):
    """A document, corpus or tokenizer cannot be used."""

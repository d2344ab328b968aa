"""How long the documents of a corpus are: what a long memory can hope for."""

from dataclasses import dataclass

import numpy as np

from byheart.config import to_dict
from byheart.data.corpus import TokenizedCorpus

__all__ = ["CorpusStats", "LengthPercentile", "LengthShare", "corpus_stats"]

_PERCENTILES = (0, 10, 25, 50, 75, 90, 100)
_LONG_TOKENS = (2048, 8192, 32_768, 65_536)


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthPercentile:
    """How long a document is that is longer than so many others."""

    percent: int
    """Percent of the documents that are this long or shorter."""
    tokens: int
    """The length of such a document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthShare:
    """How much of a corpus lies in long documents."""

    longer_than_tokens: int
    """The length from which a document counts as long."""
    token_share: float
    """Part of all tokens, between 0 and 1, that lies in longer documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusStats:
    """Size of a corpus and lengths of its documents; lengths include the start token."""

    num_documents: int
    """Documents."""
    num_tokens: int
    """Tokens, start tokens included."""
    num_bytes: int
    """UTF-8 bytes of the texts."""
    bytes_per_token: float
    """UTF-8 bytes per token, start tokens left out."""
    length_percentiles: tuple[LengthPercentile, ...]
    """Lengths of documents, from the shortest to the longest."""
    length_shares: tuple[LengthShare, ...]
    """Parts of the tokens in documents longer than typical memory sizes."""
    segment_length: int
    """Tokens of a segment, for the padding below."""
    padding_share: float
    """Part of all segment positions, between 0 and 1, that is padding."""

    def to_dict(self) -> dict[str, object]:
        """Give all numbers as JSON can hold them.

        Returns:
            Nested dictionaries and lists.
        """
        return to_dict(self)


def corpus_stats(corpus: TokenizedCorpus, *, segment_length: int = 512) -> CorpusStats:
    """Measure a corpus.

    Args:
        corpus: The tokenized corpus; only its lengths are read.
        segment_length: Tokens of a segment, for the part lost to padding.

    Returns:
        The measures.

    Raises:
        ValueError: If `segment_length` is below 1.
    """
    if segment_length < 1:
        msg = f"segment_length must be at least 1, got {segment_length}."
        raise ValueError(msg)
    lengths = corpus.lengths
    num_bytes = sum(corpus.num_bytes(index) for index in range(corpus.num_documents))
    num_starts = 0 if corpus.manifest.start_id is None else corpus.num_documents
    # the last token of a document is only a label
    num_inputs = corpus.num_tokens - corpus.num_documents
    num_positions = int((-(-(lengths - 1) // segment_length)).sum()) * segment_length
    percentiles = np.percentile(lengths, _PERCENTILES, method="inverted_cdf")
    return CorpusStats(
        num_documents=corpus.num_documents,
        num_tokens=corpus.num_tokens,
        num_bytes=num_bytes,
        bytes_per_token=num_bytes / (corpus.num_tokens - num_starts),
        length_percentiles=tuple(
            LengthPercentile(percent=percent, tokens=int(tokens))
            for percent, tokens in zip(_PERCENTILES, percentiles, strict=True)
        ),
        length_shares=tuple(
            LengthShare(
                longer_than_tokens=tokens,
                token_share=float(lengths[lengths > tokens].sum() / corpus.num_tokens),
            )
            for tokens in _LONG_TOKENS
        ),
        segment_length=segment_length,
        padding_share=1 - num_inputs / num_positions,
    )

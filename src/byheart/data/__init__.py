"""Documents, tokenizers and document-ordered rows."""

from byheart.data.corpus import TokenizedCorpus
from byheart.data.documents import Document, DocumentReader, ReadReport, iter_documents
from byheart.data.rows import Corpus, RowPlan, RowPosition, SegmentDataset, collate
from byheart.data.sample import sample_path
from byheart.data.stats import CorpusStats, corpus_stats
from byheart.data.token_cache import TokenizeProgress, default_cache_dir, tokenize_corpus
from byheart.data.tokenize import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "CorpusStats",
    "Document",
    "DocumentReader",
    "ReadReport",
    "RowPlan",
    "RowPosition",
    "SegmentDataset",
    "TokenizeProgress",
    "TokenizedCorpus",
    "Tokenizer",
    "collate",
    "corpus_stats",
    "default_cache_dir",
    "iter_documents",
    "load_tokenizer",
    "sample_path",
    "tokenize_corpus",
]

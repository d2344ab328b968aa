import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from byheart.data.corpus import TokenizedCorpus
from byheart.data.token_cache import tokenize_corpus
from byheart.data.tokenize import ByteTokenizer, Tokenizer
from byheart.memory.config import KnnMemoryConfig
from byheart.models.config import DecoderConfig
from byheart.models.decoder import Decoder

KNN_MEMORY = KnnMemoryConfig(layers=(1,), memory_size=17, top_k=3)
CONFIG = DecoderConfig(
    vocab_size=257,
    num_layers=2,
    embed_dim=11,
    num_heads=3,
    head_dim=5,
    hidden_dim=13,
    segment_length=7,
    xl_cache_length=7,
)


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., TokenizedCorpus]:
    """Tokenize texts; bytes as tokens unless another tokenizer is given."""

    def make(texts: Sequence[str], tokenizer: Tokenizer | None = None) -> TokenizedCorpus:
        records = [json.dumps({"id": f"doc{i}", "text": text}) for i, text in enumerate(texts)]
        path = tmp_path / "texts.jsonl"
        path.write_text("\n".join(records), encoding="utf-8")
        return tokenize_corpus(path, tokenizer or ByteTokenizer(), tmp_path / "tokens")

    return make


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    """Make a small model that depends on its memory, the same one for the same config.

    `knn_memory` takes changes of the memory's config, or `None` for no memory.
    """

    def make(knn_memory: Mapping[str, object] | None = MappingProxyType({}), **changes) -> Decoder:
        torch.manual_seed(2)
        knn = None if knn_memory is None else replace(KNN_MEMORY, **knn_memory)
        decoder = Decoder(replace(CONFIG, knn_memory=knn, **changes)).eval()
        with torch.no_grad():
            # losses far from uniform, so that a small mistake shows
            decoder.embedding.weight.mul_(40)
        return decoder

    return make

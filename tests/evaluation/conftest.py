import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byheart.adapters.attach import attach
from byheart.data.corpus import TokenizedCorpus
from byheart.data.token_cache import tokenize_corpus
from byheart.data.tokenize import ByteTokenizer, Tokenizer
from byheart.memory.config import KnnMemoryConfig
from byheart.models.config import DecoderConfig
from byheart.models.decoder import Decoder
from byheart.models.segment_model import SegmentModel

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


@pytest.fixture(params=["decoder", "attached"])
def reader(request: pytest.FixtureRequest, make_decoder: Callable[..., Decoder]) -> SegmentModel:
    """A decoder, or a pretrained model with memory: whatever is measured takes both."""
    if request.param == "decoder":
        return make_decoder()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return attach(
        LlamaForCausalLM(config), knn=KNN_MEMORY, segment_length=7, xl_cache_length=7, gate_init=1.0
    ).eval()

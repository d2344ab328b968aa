"""A pretrained model with memory is measured like a decoder."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byheart import KnnMemoryConfig, attach, read_tokens
from byheart.evaluation.perplexity import evaluate_perplexity

SENTENCE = "The old key opens the new door. "


@pytest.fixture
def memory_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    knn = KnnMemoryConfig(layers=(1,), memory_size=17, top_k=3)
    return attach(model, knn=knn, segment_length=7, xl_cache_length=7, gate_init=0.5)


def test_losses_equal_those_of_streaming(make_corpus, memory_model):
    corpus = make_corpus([SENTENCE * 3, "Short.", SENTENCE * 2])
    result = evaluate_perplexity(
        memory_model, corpus, memory_sizes=[0, None], rows=2, xl_cache="both"
    )
    assert [m.memory_size for m in result.measurements] == [0, 17, 0, 17]
    for index, document in enumerate(result.measurements[1].documents):
        tokens = torch.from_numpy(corpus.document(index).astype(np.int64))[None]
        read = read_tokens(
            memory_model, tokens[:, :-1], memory_model.new_state(1), return_logits=True
        )
        nats = torch.nn.functional.cross_entropy(read.logits[0], tokens[0, 1:], reduction="sum")
        assert document.nats == pytest.approx(nats.item(), rel=1e-5)
    losses = {measurement.nats_per_token for measurement in result.measurements}
    assert len(losses) == 4

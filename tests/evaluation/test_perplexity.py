import math

import numpy as np
import pytest
import torch

from byheart.data.tokenize import ByteTokenizer
from byheart.errors import DataError
from byheart.evaluation.perplexity import EvaluationProgress, evaluate_perplexity
from byheart.evaluation.result import PerplexityResult
from byheart.evaluation.token_losses import token_loss_differences
from byheart.models.streaming import read_tokens

SENTENCE = "the memory of a transformer is what it has read and not forgotten; "
# 7 tokens a segment: shorter than one, exactly two, and several with a rest
TEXTS = [SENTENCE, "abc", SENTENCE[3:17], SENTENCE[::-1] * 2, "ab", SENTENCE[5:40]]


def nats(result: PerplexityResult) -> list[list[float]]:
    return [[document.nats for document in m.documents] for m in result.measurements]


def test_uniform_model_loses_log_vocab_per_token_and_byte(make_corpus, make_decoder):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.embedding.weight.zero_()
    result = evaluate_perplexity(decoder, make_corpus(["abcdef", "gh"]), memory_sizes=[17])
    (measurement,) = result.measurements
    # 6 + 2 bytes are 8 predictions: the start token makes the first byte one of them
    assert measurement.num_tokens == 8
    assert measurement.num_bytes == 8
    assert measurement.nats_per_token == pytest.approx(math.log(257))
    assert measurement.perplexity == pytest.approx(257)
    assert measurement.bits_per_byte == pytest.approx(math.log2(257))
    assert [document.document_id for document in measurement.documents] == ["doc0", "doc1"]
    assert [document.num_tokens for document in measurement.documents] == [6, 2]


def test_result_does_not_depend_on_the_number_of_rows(make_corpus, make_decoder):
    decoder, corpus = make_decoder(), make_corpus(TEXTS)
    one, *others = (
        evaluate_perplexity(decoder, corpus, memory_sizes=[0, 17], xl_cache="both", rows=rows)
        for rows in (1, 3, 11)
    )
    for other in others:
        np.testing.assert_allclose(nats(other), nats(one), rtol=1e-6)
        for mine, theirs in zip(one.measurements, other.measurements, strict=True):
            assert [b.num_tokens for b in mine.buckets] == [b.num_tokens for b in theirs.buckets]


def test_losses_equal_those_of_streaming(make_corpus, make_decoder):
    decoder, corpus = make_decoder(), make_corpus(TEXTS)
    (measurement,) = evaluate_perplexity(decoder, corpus, memory_sizes=[None], rows=2).measurements
    assert measurement.memory_size == 17
    for index, document in enumerate(measurement.documents):
        tokens = torch.from_numpy(corpus.document(index).astype(np.int64))
        read = read_tokens(decoder, tokens[None, :-1], decoder.new_state(1), return_logits=True)
        losses = torch.nn.functional.cross_entropy(read.logits[0], tokens[1:], reduction="none")
        assert document.nats == pytest.approx(losses.double().sum().item(), rel=1e-6)
        assert document.num_tokens == len(losses)


def test_memory_size_0_equals_a_decoder_without_memory(make_corpus, make_decoder):
    decoder, corpus = make_decoder(), make_corpus(TEXTS)
    plain = make_decoder(knn_memory=None)
    plain.load_state_dict(decoder.state_dict(), strict=False)
    without = evaluate_perplexity(plain, corpus, memory_sizes=[None], rows=2)
    assert without.measurements[0].memory_size == 0
    assert nats(evaluate_perplexity(decoder, corpus, memory_sizes=[0], rows=2)) == nats(without)


def test_a_memory_longer_than_the_documents_is_as_good_as_any_larger(make_corpus, make_decoder):
    decoder, corpus = make_decoder(), make_corpus(TEXTS)
    longest = int(corpus.lengths.max())
    result = evaluate_perplexity(decoder, corpus, memory_sizes=[17, longest, 1021], rows=2)
    small, enough, larger = nats(result)
    assert small != enough
    assert larger == pytest.approx(enough, rel=1e-6)


def test_hidden_xl_cache_equals_a_model_without_one(make_corpus, make_decoder):
    decoder, corpus = make_decoder(), make_corpus(TEXTS)
    short_sighted = make_decoder(xl_cache_length=0, window_length=7)
    short_sighted.load_state_dict(decoder.state_dict())
    both = evaluate_perplexity(decoder, corpus, memory_sizes=[0, 17], xl_cache="both")
    assert [m.xl_cache_length for m in both.measurements] == [7, 7, 0, 0]
    assert [m.memory_size for m in both.measurements] == [0, 17, 0, 17]
    without = evaluate_perplexity(short_sighted, corpus, memory_sizes=[0, 17])
    np.testing.assert_allclose(nats(both)[2:], nats(without), rtol=1e-6)
    assert nats(both)[:2] != nats(both)[2:]
    hidden = evaluate_perplexity(decoder, corpus, memory_sizes=[0, 17], xl_cache="without")
    assert nats(hidden) == nats(both)[2:]


def test_buckets_hold_every_token_once(make_corpus, make_decoder):
    decoder = make_decoder(segment_length=61, xl_cache_length=61)
    corpus = make_corpus([SENTENCE * 9, SENTENCE * 33, SENTENCE])
    (measurement,) = evaluate_perplexity(decoder, corpus, memory_sizes=[17], rows=2).measurements
    # 603, 2211 and 67 bytes
    assert [bucket.num_tokens for bucket in measurement.buckets] == [
        512 + 512 + 67, 603 - 512 + 1536, 2211 - 2048, 0, 0,
    ]  # fmt: skip
    total = math.fsum(bucket.nats for bucket in measurement.buckets)
    assert total == pytest.approx(measurement.nats, rel=1e-12)
    document = torch.from_numpy(corpus.document(1).astype(np.int64))
    losses = token_loss_differences(decoder, document, 17, 17).losses_a.double()
    third = measurement.buckets[2]
    assert third.nats == pytest.approx(losses[2048:].sum().item(), rel=1e-6)


def test_reading_is_bounded_by_rows_and_segment(make_corpus, make_decoder):
    decoder, corpus = make_decoder(), make_corpus([SENTENCE * 5, *TEXTS])
    shapes: list[torch.Size] = []

    def record(module, args, out):
        shapes.append(args[0].shape)
        assert out.logits is None

    decoder.register_forward_hook(record)
    evaluate_perplexity(decoder, corpus, memory_sizes=[17], rows=6)
    assert shapes[0] == (6, 7)
    assert all(shape[1] == 7 for shape in shapes)
    # while the long document is read to its end the other rows have left
    assert shapes[-1] == (1, 7)
    assert len(shapes) == math.ceil(5 * len(SENTENCE) / 7)


def test_state_grows_by_the_keys_and_values_of_the_memory(make_corpus, make_decoder):
    decoder, corpus = make_decoder(), make_corpus(TEXTS)
    result = evaluate_perplexity(decoder, corpus, memory_sizes=[0, 29], rows=3)
    none, some = (m.peak_state_bytes for m in result.measurements)
    heads, head_dim, num_bytes, rows = 3, 5, 4, 3
    assert some - none == 2 * heads * head_dim * num_bytes * rows * 29
    # XL cache and at most one unfinished segment, in two layers
    assert none <= 2 * 2 * 2 * heads * head_dim * num_bytes * rows * 7


def test_cut_documents_are_measured_on_the_text_read(make_corpus, make_decoder):
    decoder, corpus = make_decoder(), make_corpus(["aé" * 5, "bcdefgh", "never read"])
    limits = {"memory_sizes": [0], "max_documents": 2, "max_tokens_per_document": 10}
    with_bytes = evaluate_perplexity(decoder, corpus, tokenizer=ByteTokenizer(), **limits)
    first, second = with_bytes.measurements[0].documents
    assert (first.num_tokens, first.num_bytes) == (9, 9)
    assert (second.num_tokens, second.num_bytes) == (7, 7)
    without = evaluate_perplexity(decoder, corpus, **limits)
    assert [d.num_bytes for d in without.measurements[0].documents] == [None, 7]
    assert without.measurements[0].bits_per_byte is None
    assert nats(without) == nats(with_bytes)


class NoStartTokenizer(ByteTokenizer):
    """Bytes, with nothing before a document."""

    start_id = None
    fingerprint = "bytes without start"

    def decode(self, ids):
        return bytes(np.asarray(ids, dtype=np.uint8)).decode("utf-8", errors="replace")


def test_a_first_token_that_is_not_predicted_does_not_count_as_text(make_corpus, make_decoder):
    tokenizer = NoStartTokenizer()
    decoder, corpus = make_decoder(), make_corpus(["abcdef"], tokenizer)
    (measurement,) = evaluate_perplexity(
        decoder, corpus, memory_sizes=[0], tokenizer=tokenizer
    ).measurements
    assert measurement.num_tokens == 5
    assert measurement.num_bytes == 5
    (unknown,) = evaluate_perplexity(decoder, corpus, memory_sizes=[0]).measurements
    assert unknown.bits_per_byte is None


def test_progress_ends_at_the_total(make_corpus, make_decoder):
    seen: list[EvaluationProgress] = []
    result = evaluate_perplexity(
        make_decoder(), make_corpus(TEXTS), memory_sizes=[0, 17], rows=2, on_progress=seen.append
    )
    counts = [progress.num_tokens for progress in seen]
    assert counts == sorted(counts)
    total = sum(measurement.num_tokens for measurement in result.measurements)
    assert counts[-1] == total == seen[0].total_tokens
    assert {progress.memory_size for progress in seen} == {0, 17}


def test_dropout_is_off_and_modes_come_back(make_corpus, make_decoder):
    decoder, corpus = make_decoder(dropout=0.5), make_corpus(TEXTS)
    decoder.train()
    decoder.blocks[0].eval()
    modes = [module.training for module in decoder.modules()]

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_perplexity(decoder, corpus, memory_sizes=[17], on_progress=stop)
    assert [module.training for module in decoder.modules()] == modes
    measured = nats(evaluate_perplexity(decoder, corpus, memory_sizes=[17]))
    assert [module.training for module in decoder.modules()] == modes
    assert measured == nats(evaluate_perplexity(make_decoder(), corpus, memory_sizes=[17]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_sizes": []}, r"at least one size of 0 or more, got \[\]"),
        ({"memory_sizes": [17, -1]}, r"at least one size of 0 or more, got \[17, -1\]"),
        ({"memory_sizes": [None, 17]}, "must not repeat a size, got 17 twice"),
        ({"memory_sizes": [0], "rows": 0}, "rows must be at least 1, got 0"),
        ({"memory_sizes": [0], "max_documents": 0}, "max_documents must be at least 1, got 0"),
        (
            {"memory_sizes": [0], "max_tokens_per_document": 1},
            "max_tokens_per_document must be at least 2, got 1",
        ),
        (
            {"memory_sizes": [0], "tokenizer": NoStartTokenizer()},
            "tokenizer must be the one the corpus was made with",
        ),
    ],
)
def test_refuses(make_corpus, make_decoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(make_decoder(), make_corpus(TEXTS), **arguments)


def test_refuses_memories_and_caches_the_model_has_not(make_corpus, make_decoder):
    corpus = make_corpus(TEXTS)
    with pytest.raises(ValueError, match="only be measured with memory size 0, got 64"):
        evaluate_perplexity(make_decoder(knn_memory=None), corpus, memory_sizes=[0, 64])
    with pytest.raises(ValueError, match="xl_cache='both' needs a model with an XL cache"):
        evaluate_perplexity(
            make_decoder(xl_cache_length=0), corpus, memory_sizes=[0], xl_cache="both"
        )
    buckets = {"memory_size": 15, "search": "strided_bucket", "num_buckets": 5}
    with pytest.raises(ValueError, match=r"num_buckets must divide memory_size \(17\)"):
        evaluate_perplexity(make_decoder(knn_memory=buckets), corpus, memory_sizes=[15, 17])


def test_refuses_a_corpus_of_another_vocabulary(make_corpus, make_decoder):
    with pytest.raises(ValueError, match="vocabulary of 251 tokens, its tokenizer has 257"):
        evaluate_perplexity(make_decoder(vocab_size=251), make_corpus(TEXTS), memory_sizes=[0])


def test_refuses_a_corpus_with_nothing_to_predict(make_corpus, make_decoder):
    corpus = make_corpus(TEXTS)
    corpus.lengths = np.ones_like(corpus.lengths)
    with pytest.raises(DataError, match="at least 2 tokens to predict one, the longest has 1"):
        evaluate_perplexity(make_decoder(), corpus, memory_sizes=[0])

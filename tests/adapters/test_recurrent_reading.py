"""Many documents side by side: each is read as if it were alone, and rows are never idle."""

from functools import partial

import numpy as np
import pytest
import torch

from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.recurrent_reading import read_documents
from byheart.memory.config import KnnMemoryConfig
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.testing.tiny import tiny_config, tiny_decoder

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
LENGTHS = (3, 40, 1, 14, 7, 29, 8, 21)
BERT_LAYOUT = {"start_ids": (1,), "separator_ids": (2,), "end_ids": (2,)}


def documents_of(lengths=LENGTHS, vocab=43):
    generator = np.random.default_rng(0)
    return [generator.integers(3, vocab, size=length) for length in lengths]


def one_by_one(memory_model, document, piece=None):
    """The document alone, whole or in pieces of so many tokens."""
    ids, state = torch.from_numpy(document)[None], memory_model.new_state(1)
    for part in ids.split(piece or ids.shape[1], dim=1):
        options = {"logits_to_keep": 1} if memory_model.kind == "decoder" else {}
        with torch.no_grad():
            out = memory_model(part, state=state, **options)
        state = state.commit(out.new_entries)
    return out.logits.reshape(-1), state


def assert_as_if_alone(memory_model, documents, piece=None, **options):
    found = {read.index: read for read in read_documents(memory_model, documents, **options)}
    assert sorted(found) == list(range(len(documents)))
    for index, document in enumerate(documents):
        logits, state = one_by_one(memory_model, document, piece)
        assert found[index].num_tokens == len(document)
        close(found[index].logits, logits)
        for name in ("memory", "num_segments", "num_pending", "position"):
            close(getattr(found[index].state, name), getattr(state, name))


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize(("rows", "segments_per_call"), [(1, 8), (3, 1), (3, 2), (20, 8)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_every_document_is_read_as_if_it_were_alone(
    tiny_model, name, rows, segments_per_call, alignment
):
    model = tiny_model(name)
    layout = BERT_LAYOUT if name == "bert" else {}
    config = RecurrentMemoryConfig(
        segment_length=7, num_memory_tokens=2, alignment=alignment, **layout
    )
    memory_model = RecurrentMemory(model, config).eval()
    assert_as_if_alone(memory_model, documents_of(), rows=rows, segments_per_call=segments_per_call)


@pytest.mark.parametrize("xl_cache_length", [0, 11])
def test_memories_of_the_model_itself_are_those_of_the_document(xl_cache_length):
    knn = KnnMemoryConfig(layers=(1,), memory_size=41, top_k=5)
    decoder = tiny_decoder(
        tiny_config(segment_length=11, xl_cache_length=xl_cache_length, memory=knn)
    )
    config = RecurrentMemoryConfig(segment_length=7, num_memory_tokens=2)
    memory_model = RecurrentMemory(decoder, config).eval()
    assert_as_if_alone(memory_model, documents_of(vocab=decoder.config.vocab_size), 7, rows=3)


@pytest.fixture
def reader(tiny_model):
    config = RecurrentMemoryConfig(segment_length=7, num_memory_tokens=2)
    return RecurrentMemory(tiny_model("llama"), config)


def test_a_row_that_is_done_gets_the_next_document_at_once(reader):
    taken, calls = [], []

    def documents():
        for index, document in enumerate(documents_of((70, 7, 7, 7, 14, 7))):
            taken.append(index)
            yield document

    reads = reader.read_documents(documents(), rows=2, segments_per_call=1, on_tokens=calls.append)
    order = []
    for read in reads:
        order.append(read.index)
        if read.index == 1:
            assert taken == [0, 1]
    assert order == [1, 2, 3, 4, 5, 0]
    # two rows while there are two documents
    assert calls == [14] * 6 + [7] * 4


def test_only_so_many_documents_are_held(reader):
    held = []

    class Held:
        num_tokens = 20

        def tokens(self, start, stop):
            held.append((start, stop))
            return np.full(stop - start, 5)

    reads = list(read_documents(reader, (Held() for _ in range(3)), rows=2, segments_per_call=2))
    assert [read.num_tokens for read in reads] == [20, 20, 20]
    assert held == [(0, 14), (0, 14), (14, 20), (14, 20), (0, 14), (14, 20)]


def test_plain_lists_and_tensors_are_documents_and_modes_stay(reader):
    reader.train()
    ids = documents_of((9,))[0]
    reads = [
        next(iter(reader.read_documents([tokens])))
        for tokens in (ids, ids.tolist(), torch.from_numpy(ids))
    ]
    assert reader.training
    assert torch.is_grad_enabled()
    for read in reads[1:]:
        close(read.logits, reads[0].logits)
    assert not reads[0].logits.requires_grad
    assert list(reader.read_documents([])) == []


def test_scores_of_a_document_are_its_own(reader):
    read = next(reader.read_documents(documents_of((3, 9, 9)), rows=3))
    assert read.logits.untyped_storage().nbytes() == read.logits.nbytes


def test_documents_that_are_not_what_they_say_are_refused(reader):
    class Short:
        num_tokens = 30

        def tokens(self, start, stop):
            return np.full(min(stop, 25) - start, 5)

    with pytest.raises(
        ValueError, match="Document 1 must give its tokens 21 to 28, as it has num_"
    ):
        list(reader.read_documents([[3], Short()], segments_per_call=1))
    for wrong in ([0.7, 1.9], torch.ones(1, 4).long(), "text"):
        with pytest.raises(ValueError, match="Document 0 must be token ids in a row, got"):
            # a generator: the type checks of the tests do not see what it yields
            list(read_documents(reader, (document for document in [wrong])))


def test_what_cannot_be_read_is_refused(reader, tiny_model):
    with pytest.raises(ValueError, match="at least one token, number 1 has none"):
        list(reader.read_documents([[3], []]))
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        reader.read_documents([[3]], rows=0)  # at once, not when the first is taken
    with pytest.raises(ValueError, match="segments_per_call must be at least 1, got -1"):
        list(reader.read_documents([[3]], segments_per_call=-1))
    config = RecurrentMemoryConfig(segment_length=7, num_memory_tokens=2)
    with pytest.raises(ValueError, match="for classifiers and language models, got T5"):
        list(RecurrentMemory(tiny_model("t5"), config).read_documents([[3]]))

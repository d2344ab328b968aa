"""Graphs of the segment step: where they are used, they read what is read without them.

Recording needs a GPU. On a CPU its place is taken by a function that calls the step itself on the
same tensors, as transformers calls it while it is recorded, and refuses to wait for a value.
"""

import weakref
from functools import partial

import numpy as np
import pytest
import torch

from byheart.adapters import segment_graph
from byheart.adapters.recurrent import RecurrentMemory
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.testing.tiny import tiny_config, tiny_decoder
from byheart.testing.waiting import NeverWaits

close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)
LENGTHS = (3, 40, 1, 14, 7, 70, 29, 8, 21)
BERT_LAYOUT = {"start_ids": (1,), "separator_ids": (2,), "end_ids": (2,)}
NAMES = ("bert", "roberta", "electra", "distilbert", "modernbert")
NAMES += ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gpt_neox")


@pytest.fixture
def recorded(monkeypatch):
    """Call steps where a GPU would replay them; counts recordings and replays."""
    log = {"recorded": 0, "replayed": 0}

    def capture(step, device):
        def replay():
            log["replayed"] += 1
            with monkeypatch.context() as patch, NeverWaits():
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                step()

        log["recorded"] += 1
        step()
        return replay

    monkeypatch.setattr(segment_graph, "capture", capture)
    monkeypatch.setattr(segment_graph, "can_capture", lambda device: True)
    return log


def documents_of(lengths=LENGTHS, vocab=43):
    generator = np.random.default_rng(0)
    return [generator.integers(3, vocab, size=length) for length in lengths]


def memory_around(model, **changes):
    layout = {} if "LM" in type(model).__name__ else BERT_LAYOUT
    config = RecurrentMemoryConfig(
        **{"segment_length": 7, "num_memory_tokens": 2, **layout, **changes}
    )
    return RecurrentMemory(model, config)


def assert_same_reads(memory_model, documents, **options):
    plain = list(memory_model.read_documents(documents, cuda_graphs=False, **options))
    read = list(memory_model.read_documents(documents, cuda_graphs=True, **options))
    assert [found.index for found in read] == [found.index for found in plain]
    for ours, theirs in zip(read, plain, strict=True):
        close(ours.logits, theirs.logits)
        for name in ("memory", "num_segments", "num_pending", "position"):
            close(getattr(ours.state, name), getattr(theirs.state, name))
        kept = int(ours.state.num_pending)
        assert torch.equal(ours.state.pending[0, :kept], theirs.state.pending[0, :kept])
        assert not ours.state.memory.requires_grad


@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize(("rows", "segments_per_call"), [(1, 8), (3, 2), (20, 8)])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_graphs_read_what_is_read_without_them(
    recorded, tiny_model, name, rows, segments_per_call, alignment
):
    memory_model = memory_around(tiny_model(name), alignment=alignment)
    assert_same_reads(memory_model, documents_of(), rows=rows, segments_per_call=segments_per_call)
    assert recorded["replayed"]
    assert memory_model.training


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_known_families_ask_for_no_value(recorded, tiny_model, name):
    memory_model = memory_around(tiny_model(name))
    assert segment_graph._is_known(memory_model)
    assert_same_reads(memory_model, documents_of((40, 70)), rows=2)
    assert recorded["replayed"]


@pytest.mark.parametrize(
    "settings",
    [
        {"update": "gated", "gate_noise": 0.5},
        {"normalize_memory": True, "noise": 0.1},
        {"bptt_depth": 2, "replay": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_update_of_the_memory_can_be_recorded(recorded, tiny_model, settings):
    memory_model = memory_around(tiny_model("bert"), **settings)
    # a model in training reads in evaluation mode, without noise
    assert_same_reads(memory_model.train(), documents_of((40, 33)), rows=2)
    assert recorded["replayed"]


def test_a_decoder_without_a_memory_of_its_own_can_be_recorded(recorded, monkeypatch):
    # on a CPU it looks at values that a GPU checks by itself
    monkeypatch.setattr(NeverWaits, "NAMES", ())
    decoder = tiny_decoder(tiny_config(segment_length=11, xl_cache_length=0, memory_size=0))
    memory_model = memory_around_decoder(decoder)
    assert_same_reads(memory_model, documents_of(vocab=decoder.config.vocab_size), rows=3)
    assert recorded["replayed"]


def memory_around_decoder(decoder):
    return RecurrentMemory(decoder, RecurrentMemoryConfig(segment_length=7, num_memory_tokens=2))


def test_autocast_is_that_of_the_reading(recorded, tiny_model):
    memory_model = memory_around(tiny_model("bert"))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_reads(memory_model, documents_of((40, 33)), rows=2)
    assert recorded["replayed"]


def test_a_backbone_that_was_compiled_in_place_is_read_the_same(recorded, tiny_model):
    memory_model, documents = memory_around(tiny_model("bert")), documents_of((14, 28))
    expected = list(memory_model.read_documents(documents, rows=1, cuda_graphs=False))
    memory_model.model.base_model.compile(backend="aot_eager", dynamic=False)
    found = list(memory_model.read_documents(documents, rows=1, cuda_graphs=True))
    assert recorded["replayed"]
    for ours, theirs in zip(found, expected, strict=True):
        close(ours.logits, theirs.logits)


def test_one_recording_for_each_number_of_rows(recorded, tiny_model):
    memory_model = memory_around(tiny_model("bert"))
    assert_same_reads(memory_model, documents_of((70, 35, 35, 35)), rows=2)
    # two rows until the long document and the second short one are over, then one
    assert recorded["recorded"] == 2
    assert_same_reads(memory_model, documents_of((70, 35, 14, 14)), rows=2)
    # the fourth takes the row of the third, and both rows end together
    assert recorded["recorded"] == 3


@pytest.mark.parametrize("segments_per_call", [1, 8])
@pytest.mark.parametrize(("whole", "recordings"), [(15, 0), (16, 1)])
def test_segments_are_counted_once_however_they_are_given(
    recorded, tiny_model, segments_per_call, whole, recordings
):
    memory_model = memory_around(tiny_model("bert"))
    documents = documents_of((7 * whole + 1,))
    list(memory_model.read_documents(documents, segments_per_call=segments_per_call))
    assert recorded == {"recorded": recordings, "replayed": recordings * whole}


def test_without_room_for_a_graph_documents_are_read_all_the_same(
    recorded, tiny_model, monkeypatch
):
    def capture(step, device):
        raise torch.OutOfMemoryError

    memory_model = memory_around(tiny_model("bert"))
    (expected,) = memory_model.read_documents(documents_of((700,)), cuda_graphs=False)
    monkeypatch.setattr(segment_graph, "capture", capture)
    with pytest.warns(RuntimeWarning, match="needs more memory than the GPU has left"):
        (found,) = memory_model.read_documents(documents_of((700,)))
    close(found.logits, expected.logits)
    with pytest.raises(torch.OutOfMemoryError):
        list(memory_model.read_documents(documents_of((700,)), cuda_graphs=True))


def test_weights_that_moved_are_recorded_again(recorded, tiny_model):
    memory_model = memory_around(tiny_model("bert"))
    reads = memory_model.read_documents(documents_of((35, 70)), rows=1, cuda_graphs=True)
    next(reads)
    memory_model.model.double().float()
    next(reads)
    assert recorded["recorded"] == 2


def test_a_graph_is_made_by_itself_once_it_pays(recorded, tiny_model):
    memory_model = memory_around(tiny_model("bert"))
    assert len(list(memory_model.read_documents(documents_of((35,))))) == 1
    assert recorded["recorded"] == 0
    # several short ones one after the other, too
    assert len(list(memory_model.read_documents(documents_of((35,) * 6), rows=1))) == 6
    assert recorded == {"recorded": 1, "replayed": 4 * 3}
    assert len(list(memory_model.read_documents(documents_of((700,)), cuda_graphs=False))) == 1
    assert recorded["recorded"] == 1
    bloom = memory_around(tiny_model("bloom"))
    assert len(list(bloom.read_documents(documents_of((700,))))) == 1
    assert recorded["recorded"] == 1


def test_tokens_are_told_piece_by_piece(recorded, tiny_model):
    calls = []
    memory_model = memory_around(tiny_model("llama"))
    options = {"segments_per_call": 3, "cuda_graphs": True, "on_tokens": calls.append}
    assert list(memory_model.read_documents(documents_of((59,)), **options))
    assert calls == [21, 21, 14, 3]


def refuse(step, device):
    msg = "operation not permitted when stream is capturing"
    raise RuntimeError(msg)


def test_what_cannot_be_recorded_is_read_without(recorded, monkeypatch, tiny_model):
    monkeypatch.setattr(segment_graph, "capture", refuse)
    memory_model = memory_around(tiny_model("bert"))
    (plain,) = memory_model.read_documents(documents_of((700,)), cuda_graphs=False)
    with pytest.warns(RuntimeWarning, match="A segment step of BertForSequenceClassification"):
        (read,) = memory_model.read_documents(documents_of((700,)))
    assert torch.equal(read.logits, plain.logits)
    with pytest.raises(RuntimeError, match=r"when stream is capturing. Pass cuda_graphs=False"):
        list(memory_model.read_documents(documents_of((700,)), cuda_graphs=True))


def test_graphs_that_cannot_be_are_refused_at_once(recorded, monkeypatch, tiny_model):
    model = tiny_model("bert")
    center = memory_around(model, alignment="center")
    with pytest.raises(ValueError, match="needs segments of one length, got alignment 'center'"):
        center.read_documents([[3]], cuda_graphs=True)
    with pytest.raises(ValueError, match="needs memory tokens, got num_memory_tokens 0"):
        memory_around(model, num_memory_tokens=0).read_documents([[3]], cuda_graphs=True)
    decoder = tiny_decoder(tiny_config(segment_length=11, xl_cache_length=11, memory_size=0))
    with pytest.raises(ValueError, match="whose only state is the memory"):
        memory_around_decoder(decoder).read_documents([[3]], cuda_graphs=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="needs a model on a CUDA device, got one on cpu"):
        memory_around(model).read_documents([[3]], cuda_graphs=True)
    # by themselves they are left out
    for memory_model in (center, memory_around_decoder(decoder)):
        assert len(list(memory_model.read_documents([[3] * 700]))) == 1


def test_a_recording_keeps_the_tensors_that_its_graph_writes_to():
    tensor, replays = torch.zeros(3), []
    written = weakref.ref(tensor)
    recording = segment_graph.Recording(lambda: replays.append(1), partial(tensor.add_, 1))
    del tensor
    recording()
    assert replays == [1]
    assert written() is not None

"""Real CUDA graphs of the segment step."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from byheart.adapters import segment_graph
from byheart.adapters.recurrent import RecurrentMemory
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.testing.tiny import tiny_config, tiny_decoder
from byheart.testing.waiting import gpu_never_waits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
LENGTHS = (3, 140, 1, 14, 7, 70, 29, 8, 21)
NAMES = ("bert", "roberta", "electra", "distilbert", "modernbert")
NAMES += ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gpt_neox")
MORE = ("opt", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "starcoder2")


def documents_of(lengths=LENGTHS, vocab=43):
    generator = np.random.default_rng(0)
    return [generator.integers(3, vocab, size=length) for length in lengths]


def memory_around(model, **changes):
    layout = {"start_ids": (1,), "separator_ids": (2,), "end_ids": (2,)}
    if not type(model).__name__.endswith("ForSequenceClassification"):
        layout = {}
    settings = {"segment_length": 7, "num_memory_tokens": 2, **layout, **changes}
    return RecurrentMemory(model.to(DEVICE), RecurrentMemoryConfig(**settings))


def assert_same_reads(memory_model, documents, tolerance=1e-4, **options):
    plain = list(memory_model.read_documents(documents, cuda_graphs=False, **options))
    read = list(memory_model.read_documents(documents, cuda_graphs=True, **options))
    assert [found.index for found in read] == [found.index for found in plain]
    for ours, theirs in zip(read, plain, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=tolerance, atol=tolerance)
        for name in ("memory", "num_segments", "num_pending", "position"):
            torch.testing.assert_close(
                getattr(ours.state, name),
                getattr(theirs.state, name),
                rtol=tolerance,
                atol=tolerance,
            )


@pytest.mark.parametrize("name", NAMES)
def test_known_families(tiny_model, name):
    memory_model = memory_around(tiny_model(name, attn_implementation="sdpa"))
    assert segment_graph._is_known(memory_model)
    assert_same_reads(memory_model, documents_of(), rows=3)
    assert_same_reads(memory_model, documents_of((140,)), rows=1)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_recorded_step_attends_without_a_mask(tiny_model, name):
    memory_model = memory_around(tiny_model(name, attn_implementation="sdpa"))
    # the only kernel there is takes no mask, and half precision alone
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16):
        segment_graph.SegmentGraph(memory_model, 2)


@pytest.mark.parametrize("name", MORE)
def test_families_that_are_recorded_when_asked_to(tiny_model, name):
    assert_same_reads(memory_around(tiny_model(name)), documents_of(), rows=3)


def test_what_cannot_be_recorded_is_said_and_read_all_the_same(tiny_model, monkeypatch):
    # takes a part of a tensor by a list, whose numbers lie in main memory
    with pytest.raises(RuntimeError, match="A segment step of FalconForCausalLM must do the same"):
        list(memory_around(tiny_model("falcon")).read_documents(documents_of(), cuda_graphs=True))
    memory_model = memory_around(tiny_model("bert", attn_implementation="eager"))
    expected = list(memory_model.read_documents(documents_of((140,))))
    with pytest.raises(RuntimeError, match="to be recorded as a CUDA graph"):
        list(memory_model.read_documents(documents_of((140,)), cuda_graphs=True))
    monkeypatch.setattr(segment_graph, "_is_known", lambda _: True)
    with pytest.warns(RuntimeWarning, match="It is read without graphs"):
        found = list(memory_model.read_documents(documents_of((140,))))
    torch.testing.assert_close(found[0].logits, expected[0].logits)


def test_a_decoder_without_a_memory_of_its_own():
    decoder = tiny_decoder(tiny_config(segment_length=11, xl_cache_length=0, memory_size=0))
    memory_model = memory_around(decoder)
    assert_same_reads(memory_model, documents_of(vocab=decoder.config.vocab_size), rows=3)


@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize("update", ["replace", "gated"])
def test_alignments_and_updates(tiny_model, alignment, update):
    memory_model = memory_around(tiny_model("bert"), alignment=alignment, update=update)
    assert_same_reads(memory_model.train(), documents_of(), rows=2)
    assert memory_model.training


def test_autocast_and_half_weights(tiny_model):
    memory_model = memory_around(tiny_model("bert"))
    with torch.autocast("cuda", torch.bfloat16):
        assert_same_reads(memory_model, documents_of((140, 70)), 2e-2, rows=2)
    halved = memory_around(tiny_model("bert").bfloat16())
    assert_same_reads(halved, documents_of((140, 70)), 2e-2, rows=2)


def test_graphs_are_used_by_themselves_and_change_nothing_else(tiny_model, monkeypatch):
    made, record = [], segment_graph.capture
    monkeypatch.setattr(
        segment_graph, "capture", lambda *given: made.append(given) or record(*given)
    )
    memory_model = memory_around(tiny_model("bert"))
    (expected,) = memory_model.read_documents(documents_of((700,)), cuda_graphs=False)
    torch.manual_seed(5)
    drawn = torch.rand(3, device=DEVICE)
    torch.manual_seed(5)
    (found,) = memory_model.read_documents(documents_of((700,)))
    assert len(made) == 1
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    # random numbers and training go on as if nothing had been recorded
    assert torch.equal(torch.rand(3, device=DEVICE), drawn)
    ids = torch.from_numpy(documents_of((21,))[0])[None].to(DEVICE)
    memory_model(ids, labels=torch.tensor([1], device=DEVICE)).loss.backward()
    assert memory_model.memory.memory.grad.abs().sum() > 0


def test_replays_wait_for_nothing(tiny_model):
    memory_model = memory_around(tiny_model("bert"))
    graph = segment_graph.SegmentGraph(memory_model, 1)
    memory = memory_model.first_memory(memory_model.new_state(1))
    ids = torch.from_numpy(documents_of((70,))[0])[None]
    with gpu_never_waits():
        graph.start(memory)
        graph.read(ids.pin_memory().to(DEVICE, non_blocking=True))
        after = graph.memory()
    assert after.isfinite().all()

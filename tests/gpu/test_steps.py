"""Whole steps on a GPU: the same as on the CPU, without waiting, and from CUDA graphs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from byheart import KnnMemoryConfig, attach
from byheart.adapters.recurrent import RecurrentMemory
from byheart.models.config import preset
from byheart.models.decoder import Decoder
from byheart.models.generate import generate
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.streaming import read_tokens
from byheart.testing.waiting import gpu_never_waits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS, SEGMENT, VOCAB = 3, 32, 97
COMBINED = ("gate", "joint", "content_gate")


def make_decoder(combine="gate", memory_size=4096, device="cuda"):
    torch.manual_seed(0)
    knn = KnnMemoryConfig(layers=(1,), memory_size=memory_size, top_k=8, combine=combine)
    config = preset("tiny", VOCAB, segment_length=SEGMENT, xl_cache_length=SEGMENT, knn_memory=knn)
    return Decoder(config).to(device)


def batches(count, device="cuda"):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (ROWS, count * SEGMENT + 1), generator=generator).to(device)
    for start in range(0, count * SEGMENT, SEGMENT):
        yield tokens[:, start : start + SEGMENT], tokens[:, start + 1 : start + SEGMENT + 1]


def train(decoder, count=6):
    """Return the losses of some steps and the gradients."""
    state, losses = decoder.new_state(ROWS), []
    for inputs, targets in batches(count, decoder.embedding.weight.device):
        out = decoder(inputs, state=state, targets=targets)
        out.loss.backward()
        losses.append(out.loss.detach())
        state = state.commit(out.new_entries)
    return torch.stack(losses).cpu(), [weight.grad.cpu() for weight in decoder.parameters()]


@pytest.mark.parametrize("combine", COMBINED)
@pytest.mark.parametrize("memory_size", [8, 4096])
def test_training_equals_that_on_the_cpu(combine, memory_size):
    expected = make_decoder(combine, memory_size, "cpu")
    losses, gradients = train(expected)
    decoder = make_decoder(combine, memory_size)
    found, found_gradients = train(decoder)
    torch.testing.assert_close(found, losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found_gradients, gradients, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("combine", COMBINED)
def test_a_training_step_does_not_wait(combine):
    decoder = make_decoder(combine)
    train(decoder, 2)
    state, segments = decoder.new_state(ROWS), list(batches(4))
    with gpu_never_waits():
        for inputs, targets in segments:
            out = decoder(inputs, state=state, targets=targets)
            out.loss.backward()
            state = state.commit(out.new_entries)


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_cuda_graphs_compute_the_same(kind):
    script = Path(__file__).with_name("graphs.py")
    result = subprocess.run([sys.executable, script, kind], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@torch.no_grad()
def test_decoding_does_not_wait():
    decoder = make_decoder().eval()
    prompt = torch.randint(VOCAB, (ROWS, 3 * SEGMENT), device="cuda")
    read = read_tokens(decoder, prompt, decoder.new_state(ROWS))
    for _ in range(2):
        read = read_tokens(decoder, prompt[:, :1], read.state)
    with gpu_never_waits():
        for _ in range(SEGMENT + 1):
            read = read_tokens(decoder, read.last_logits.argmax(-1, keepdim=True), read.state)


def test_generating_equals_that_on_the_cpu():
    prompt = torch.randint(VOCAB, (ROWS, 3 * SEGMENT + 5))
    expected = generate(make_decoder(device="cpu").eval(), prompt, max_new_tokens=40)
    found = generate(make_decoder().eval(), prompt.cuda(), max_new_tokens=40)
    agreed = (found.tokens.cpu() == expected.tokens).float().mean()
    # one near tie may lead a row elsewhere
    assert agreed > 0.5


@torch.no_grad()
def test_a_memory_attached_to_llama_reads_the_same_on_a_gpu():
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            )
        ).eval()  # fmt: skip
        memory_model = attach(
            model.to(device),
            knn=KnnMemoryConfig(layers=(1,), memory_size=256, top_k=8),
            segment_length=SEGMENT,
            xl_cache_length=SEGMENT,
            gate_init=0.5,
            normalize_qk=True,
        )
        state, found = memory_model.new_state(ROWS), []
        for inputs, targets in batches(6, device):
            out = memory_model(inputs, state=state, targets=targets)
            state = state.commit(out.new_entries)
            found.append(out.loss.cpu())
        losses.append(torch.stack(found))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("replay", [True, False])
def test_recurrent_memory_learns_the_same_on_a_gpu(replay):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, max_position_embeddings=64, num_labels=5,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    config = RecurrentMemoryConfig(segment_length=SEGMENT, num_memory_tokens=4, replay=replay)
    assert RecurrentMemory(model.cuda(), config).memory.memory.is_cuda
    memory_model = RecurrentMemory(model, config)
    ids, labels = torch.randint(VOCAB, (ROWS, 5 * SEGMENT - 3)), torch.arange(ROWS)
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        memory_model.to(device).zero_grad()
        out = memory_model(ids.to(device), labels=labels.to(device))
        out.loss.backward()
        losses.append(out.loss.detach().cpu())
        weights = memory_model.parameters()
        gradients.append([w.grad.cpu().clone() for w in weights if w.grad is not None])
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-2)

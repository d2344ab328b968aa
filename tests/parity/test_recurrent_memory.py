"""Recurrent memory equals what the authors' wrappers computed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from byheart.errors import DataError
from byheart.testing.parity import TOLERANCE, main
from byheart.testing.parity_recurrent import recurrent_differences

DATA = Path(__file__).parent / "data"
RECORDINGS = ("rmt_decoder_gpt2", "rmt_encoder_bert")


@pytest.fixture
def copied(tmp_path):
    def copy(name):
        return shutil.copytree(DATA / name, tmp_path / name)

    return copy


def rewrite(directory, change, metadata):
    path = directory / "expected.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


DECODER = {"segment_length": "16", "num_memory_tokens": "4"}


@pytest.mark.parametrize("name", RECORDINGS)
def test_agrees_with_the_authors_wrapper(name):
    found = recurrent_differences(DATA / name)

    assert {"logits", "loss", "grad_memory_tokens", "grad_input_embeddings"} <= found.keys()
    assert max(found.values()) <= TOLERANCE


def test_memory_after_each_segment_is_compared():
    assert "memory_states" in recurrent_differences(DATA / "rmt_decoder_gpt2")


def test_other_architecture_and_short_last_segment(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "model")
    memory = torch.randn(3, 24, requires_grad=True)
    ids = torch.randint(0, 53, (2, 18))
    mask = torch.rand(2, 18) < 0.5
    mask[:, -1] = False
    # the authors' loop, written out
    state, logits, states = memory.expand(2, -1, -1), [], []
    for start in range(0, 18, 7):
        text = llama.get_input_embeddings()(ids[:, start : start + 7])
        window = torch.cat([state, text, state], dim=1)
        out = llama(inputs_embeds=window, output_hidden_states=True)
        state = out.hidden_states[-1][:, -3:]
        logits.append(out.logits[:, 3:-3])
        states.append(state.detach())
    together = torch.cat(logits, dim=1)
    losses = torch.nn.functional.cross_entropy(
        together[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    loss = losses[mask[:, :-1].flatten()].mean()
    loss.backward()
    tensors = {
        "memory_tokens": memory.detach(),
        "input_ids": ids,
        "labels_mask": mask,
        "logits": together.detach(),
        "loss": loss.detach()[None],
        "memory_states": torch.stack(states),
        "grad_memory_tokens": memory.grad,
        "grad_input_embeddings": llama.get_input_embeddings().weight.grad,
    }
    facts = {"segment_length": "7", "num_memory_tokens": "3"}
    save_file(tensors, tmp_path / "expected.safetensors", metadata=facts)

    found = recurrent_differences(tmp_path)

    assert set(found) == {
        "logits", "loss", "memory_states", "grad_memory_tokens", "grad_input_embeddings",
    }  # fmt: skip
    assert max(found.values()) <= TOLERANCE


def test_difference_is_reported_and_fails(copied, capsys):
    directory = copied("rmt_decoder_gpt2")

    def change(tensors):
        tensors["logits"][1, 70, 5] += 0.5

    rewrite(directory, change, DECODER)

    assert main([str(directory)]) == 1
    assert "logits: largest difference 5.0e-01, DIFFERS" in capsys.readouterr().out


def test_missing_tensor_is_named(copied):
    directory = copied("rmt_decoder_gpt2")
    rewrite(directory, lambda tensors: tensors.pop("loss"), DECODER)

    with pytest.raises(DataError, match="lacks the tensor loss"):
        recurrent_differences(directory)


def test_missing_metadata_is_named(copied):
    directory = copied("rmt_decoder_gpt2")
    rewrite(directory, lambda _: None, {"segment_length": "16"})

    with pytest.raises(DataError, match="must name segment_length and num_memory_tokens"):
        recurrent_differences(directory)


def test_metadata_that_nothing_needs_may_say_anything(copied):
    directory = copied("rmt_decoder_gpt2")
    rewrite(directory, lambda _: None, {**DECODER, "format": "pt"})
    assert max(recurrent_differences(directory).values()) <= TOLERANCE


@pytest.mark.parametrize("name", ["segment_length", "num_memory_tokens", "sep"])
def test_metadata_that_must_be_numbers_are_refused_otherwise(name, copied):
    directory = copied("rmt_decoder_gpt2")
    rewrite(directory, lambda _: None, {**DECODER, name: "many"})
    with pytest.raises(DataError, match=rf"{name} in the metadata .* must be a number, got 'many'"):
        recurrent_differences(directory)


def test_model_that_does_not_fit_is_refused(copied):
    directory = copied("rmt_decoder_gpt2")
    rewrite(directory, lambda _: None, {"segment_length": "1600", "num_memory_tokens": "4"})

    with pytest.raises(DataError, match="must hold a model that fits its metadata"):
        recurrent_differences(directory)


def test_memory_of_another_shape_is_refused(copied):
    directory = copied("rmt_decoder_gpt2")
    rewrite(directory, lambda _: None, {"segment_length": "16", "num_memory_tokens": "5"})

    with pytest.raises(DataError, match=r"must have the shape \[5, 32\], got \[4, 32\]"):
        recurrent_differences(directory)


def test_directory_without_recording_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        recurrent_differences(tmp_path)

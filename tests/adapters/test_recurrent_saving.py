"""Added weights are saved without the model, and put back around it."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from byheart.adapters.loading import load_transformer
from byheart.adapters.recurrent import RecurrentMemory
from byheart.errors import CheckpointError
from byheart.models.recurrent_config import RecurrentMemoryConfig


def bert(width=24):
    config = BertConfig(
        vocab_size=37, hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=32, num_labels=5,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.fixture
def memory_model():
    torch.manual_seed(0)
    config = RecurrentMemoryConfig(
        segment_length=7, num_memory_tokens=3, alignment="right", start_ids=(2,),
        separator_ids=(3,), end_ids=(3,), update="gated", normalize_memory=True,
    )  # fmt: skip
    return RecurrentMemory(bert(), config).eval()


def logits(memory_model):
    ids = torch.arange(34).reshape(2, 17)
    with torch.no_grad():
        return memory_model(ids).logits


def test_put_around_the_same_model_nothing_differs(memory_model, tmp_path):
    memory_model.save_pretrained(tmp_path / "memory")

    loaded = RecurrentMemory.from_pretrained(memory_model.model, tmp_path / "memory")

    assert loaded.memory_config == memory_model.memory_config
    assert torch.equal(logits(loaded), logits(memory_model))


def test_added_weights_alone_are_saved(memory_model, tmp_path):
    memory_model.save_pretrained(tmp_path / "memory")

    names = {path.name for path in (tmp_path / "memory").iterdir()}

    assert names == {
        "manifest.json", "recurrent_memory.safetensors", "recurrent_memory_config.json",
    }  # fmt: skip


def test_trained_model_is_saved_along(memory_model, tmp_path):
    memory_model.save_pretrained(tmp_path / "memory", with_model=True)

    loaded = RecurrentMemory.from_pretrained(None, tmp_path / "memory")

    assert torch.equal(logits(loaded), logits(memory_model))


def test_a_model_with_layers_of_peft_is_not_saved_along(memory_model, tmp_path):
    config = peft.LoraConfig(target_modules=["query"], r=2)
    peft.inject_adapter_in_model(config, memory_model.model)

    with pytest.raises(ValueError, match=r"has layers of PEFT, such as bert.*merge_and_unload"):
        memory_model.save_pretrained(tmp_path / "memory", with_model=True)

    assert not (tmp_path / "memory").exists()
    memory_model.save_pretrained(tmp_path / "memory")


def test_a_model_that_lacks_weights_is_not_loaded(tmp_path):
    bert().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(
        CheckpointError, match=r"lacks 1, such as classifier\.weight\. Save the whole"
    ):
        load_transformer(tmp_path)


def test_precision_is_saved_along(memory_model, tmp_path):
    memory_model.bfloat16().save_pretrained(tmp_path / "memory", with_model=True)

    loaded = RecurrentMemory.from_pretrained(None, tmp_path / "memory")

    assert loaded.memory.memory.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(memory_model))


def test_memory_alone_needs_its_model(memory_model, tmp_path):
    memory_model.save_pretrained(tmp_path / "memory")

    with pytest.raises(CheckpointError, match="holds the memory alone, not the bert model"):
        RecurrentMemory.from_pretrained(None, tmp_path / "memory")


def test_other_model_is_refused(memory_model, tmp_path):
    memory_model.save_pretrained(tmp_path / "memory")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=24, n_layer=1, n_head=2))

    with pytest.raises(CheckpointError, match="belongs to a bert model of width 24, got a gpt2"):
        RecurrentMemory.from_pretrained(gpt2, tmp_path / "memory")
    with pytest.raises(CheckpointError, match="of width 24, got a bert model of width 28"):
        RecurrentMemory.from_pretrained(bert(28), tmp_path / "memory")


def test_damaged_directory_is_refused(memory_model, tmp_path):
    memory_model.save_pretrained(tmp_path / "memory")
    weights = tmp_path / "memory" / "recurrent_memory.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])

    with pytest.raises(CheckpointError, match="was cut short"):
        RecurrentMemory.from_pretrained(memory_model.model, tmp_path / "memory")


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="There is no directory"):
        RecurrentMemory.from_pretrained(bert(), tmp_path / "nothing")

"""LoRA beside the weights of a pretrained model with memory: learned, resumed, and merged."""

import json
import shutil
import sys
from dataclasses import replace

import peft
import pytest
import torch
from training_setup import VOCAB, make_dataset, training_config
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from byheart import read_tokens
from byheart.adapters.attach import attach
from byheart.adapters.memory_saving import first_adapter, load_attached
from byheart.errors import CheckpointError
from byheart.memory.config import KnnMemoryConfig
from byheart.memory.files import load_directory
from byheart.training.arguments import training_arguments
from byheart.training.checkpoint import find_checkpoint
from byheart.training.config import PretrainedConfig
from byheart.training.lora import merge_lora
from byheart.training.models import make_model
from byheart.training.run import train
from byheart.training.trainer import MemoryTrainer

# PEFT 0.21 asks transformers 5.23 by the older of two names
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def run(attached_run):
    return with_lora(attached_run)


def with_lora(run, **changes):
    return replace(run, pretrained=replace(run.pretrained, trains="lora", lora_rank=2, **changes))


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"}
            for line in lines]  # fmt: skip


def changed(model, folder):
    before = dict(LlamaForCausalLM.from_pretrained(folder).named_parameters())
    return {
        name.split(".")[-2]
        for name, weight in model.named_parameters()
        if not torch.equal(weight, before[name])
    }


def test_memory_and_lora_learn_and_the_model_is_whole_at_the_end(run, llama, tmp_path):
    result = train(run, tmp_path / "run")
    # nothing of PEFT is left, so transformers reads it, and so does everything of byheart
    loaded = load_attached(None, result.model_dir)
    assert first_adapter(loaded.model) is None
    assert all(weight.abs().sum() > 0 for weight in loaded.memory_parameters())
    assert changed(loaded.detach(), llama) == {"q_proj", "v_proj"}
    assert losses(tmp_path / "run")[-1]["evaluation/nats_per_token/memory_23"] < 5.7


def test_layers_are_chosen_and_what_is_learned_is_scaled(run, llama, tmp_path):
    run = with_lora(run, lora_modules=("o_proj", "up_proj"), lora_alpha=1)
    loaded = load_attached(None, train(run, tmp_path / "run").model_dir)
    assert changed(loaded.detach(), llama) == {"o_proj", "up_proj"}
    layers = [layer for layer in make_model(run, 256).modules() if hasattr(layer, "scaling")]
    assert {layer.scaling["default"] for layer in layers if hasattr(layer, "lora_A")} == {1 / 2}


def test_checkpoints_hold_what_learns_and_resuming_repeats_the_run(run, tmp_path):
    run = replace(run, training=replace(run.training, schedule="constant"))
    train(run, tmp_path / "whole")
    short = replace(run, training=replace(run.training, max_steps=3))
    train(short, tmp_path / "parts")
    saved, _ = load_directory(tmp_path / "parts" / "checkpoint-3" / "model")
    assert {"lora" if "lora_" in name else "memory" for name in saved} == {"lora", "memory"}
    train(run, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    names = ("parts", "whole")
    parts, whole = (load_attached(None, tmp_path / name / "model").state_dict() for name in names)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_finished_run_is_merged_again(run, tmp_path):
    train(run, tmp_path / "run")
    expected = load_attached(None, tmp_path / "run" / "model").state_dict()
    shutil.rmtree(tmp_path / "run" / "model")
    train(run, tmp_path / "run", resume=True)
    found = load_attached(None, tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_it_says_what_it_said_before(family, run, tmp_path):
    if family == "gpt2":
        run = around_gpt2(run, tmp_path)
    model = make_model(run, 256).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(256, (1, 21))
    before = read_tokens(model, ids, model.new_state(1), return_logits=True).logits
    merge_lora(model)
    after = read_tokens(model, ids, model.new_state(1), return_logits=True).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_weights_of_another_model_are_refused(run, tmp_path):
    train(replace(run, training=replace(run.training, max_steps=3)), tmp_path / "run")
    torch.manual_seed(6)
    config = LlamaConfig.from_pretrained(run.pretrained.path)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    other = replace(run, pretrained=replace(run.pretrained, path=str(tmp_path / "other")))
    with pytest.raises(CheckpointError, match=r"beside the weights of another model\. Name the"):
        train(other, tmp_path / "run", resume=True)


def around_gpt2(run, tmp_path):
    """GPT-2 has its matrices the other way round."""
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    memory = replace(run.pretrained.memory, xl_cache_length=0)
    return with_lora(run, path=str(tmp_path / "gpt2"), memory=memory)


def test_gpt2_learns_with_lora(run, tmp_path):
    assert train(around_gpt2(run, tmp_path), tmp_path / "run").steps == 6


def test_a_model_that_has_an_adapter_already_is_refused(run, llama, tmp_path):
    adapted = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(llama), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapted.save_pretrained(llama)
    with pytest.raises(CheckpointError, match=r"must have no adapter of PEFT, got one, such as"):
        train(run, tmp_path / "run")


def test_layers_that_are_not_there_are_refused_before_a_run_is_overwritten(run, tmp_path):
    train(run, tmp_path / "run")
    kept = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"lora_modules must name linear layers .* \['qproj'\]"):
        train(with_lora(run, lora_modules=("qproj",)), tmp_path / "run", overwrite=True)
    with pytest.raises(ValueError, match=r"lora_modules must name linear layers .* \['vproj'\]"):
        train(with_lora(run, lora_modules=("q_proj", "vproj")), tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == kept


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_weights_that_are_used_twice_are_refused(run, tmp_path):
    config = LlamaConfig.from_pretrained(run.pretrained.path, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    run = with_lora(run, path=str(tmp_path / "tied"), lora_modules=("lm_head",))
    with pytest.raises(ValueError, match=r"used in no other place, got lm_head\. Leave it out"):
        train(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trains": "lora", "lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"trains": "lora", "lora_alpha": 0}, "lora_alpha must be at least 1, got 0"),
        ({"trains": "lora", "from_scratch": True}, "from_scratch must be false with trains='lora'"),
        ({"lora_rank": 4}, r"must be left out unless trains='lora', got trains='all'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainedConfig(path="folder", **settings)


def test_without_peft_it_is_said_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"needs the peft package: pip install 'byheart\[peft\]'"):
        train(run, tmp_path / "run")


def test_layers_that_were_put_on_by_hand_are_trained_and_resumed(tmp_path):
    def train_by_hand(directory, max_steps, resume):
        config = training_config(max_steps=max_steps, schedule="constant")
        dataset = make_dataset(config)
        torch.manual_seed(0)
        settings = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, intermediate_size=24, **settings))
        memory_model = attach(
            model, knn=KnnMemoryConfig(layers=(-1,), memory_size=23, top_k=4), segment_length=7
        )
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["byheart_memory"])
        peft.get_peft_model(memory_model.model, lora)
        trainer = MemoryTrainer(
            memory_model, dataset, config, training_arguments(config, directory)
        )
        trainer.train(resume)
        assert first_adapter(memory_model.model) is not None

    train_by_hand(tmp_path / "whole", 6, None)
    train_by_hand(tmp_path / "parts", 3, None)
    train_by_hand(tmp_path / "parts", 6, find_checkpoint(tmp_path / "parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

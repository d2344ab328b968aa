"""Pretrained models to put memory on; `training_setup` importable; collecting garbage fast."""

import gc
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

from byheart.adapters.attach_config import AttachConfig
from byheart.data.tasks.facts import people_sentences
from byheart.memory.config import KnnMemoryConfig
from byheart.training.config import DataConfig, PretrainedConfig, RunConfig

sys.path.insert(0, str(Path(__file__).parent))


from training_setup import training_config

SENTENCE = "The old key opens the new door. "


@pytest.fixture(autouse=True, scope="package")
def _frozen_modules():
    """Keep what is imported out of the garbage collections that every training begins with."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def llama(tmp_path):
    """The folder of a tiny pretrained model."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def attached_run(llama, tmp_path):
    """Six steps of it with a memory, on three documents."""
    texts = [SENTENCE * 4, "Nothing else. " * 5, SENTENCE * 2]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    memory = AttachConfig(
        knn=KnnMemoryConfig(layers=(-1,), memory_size=23, top_k=4),
        segment_length=7, xl_cache_length=7,
    )  # fmt: skip
    return RunConfig(
        name="attached",
        pretrained=PretrainedConfig(path=str(llama), memory=memory),
        data=DataConfig(train=str(path), validation=str(path), cache_dir=str(tmp_path / "cache")),
        training=training_config(max_steps=6, evaluate_every=3),
    )


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A BERT in half precision with the usual WordPiece tokenizer, as a folder."""
    folder = tmp_path / "bert"
    words = re.findall(
        r"\w+|[.?,]", " ".join(people_sentences()[0] + people_sentences()[1]).lower()
    )
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words), *letters]
    vocab = list(dict.fromkeys([*vocab, *(f"##{letter}" for letter in letters)]))
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(vocab)})
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=14, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=11, max_position_embeddings=40,
    )  # fmt: skip
    BertModel(config).to(torch.float16).save_pretrained(folder)
    return folder

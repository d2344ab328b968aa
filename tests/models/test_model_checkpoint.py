"""Saved decoders: the same again, or a refusal that says why."""

import json

import pytest
import torch

from byheart.errors import CheckpointError
from byheart.memory.config import KnnMemoryConfig
from byheart.models.checkpoint import load_model, load_weights, save_model
from byheart.models.config import DecoderConfig
from byheart.models.decoder import Decoder


def _decoder(**changes) -> Decoder:
    settings = {
        "vocab_size": 31, "num_layers": 2, "embed_dim": 11, "num_heads": 3, "head_dim": 5,
        "hidden_dim": 13, "segment_length": 7, "xl_cache_length": 7,
        "knn_memory": KnnMemoryConfig(layers=(1,), memory_size=23, top_k=4),
    }  # fmt: skip
    return Decoder(DecoderConfig(**(settings | changes)))


def test_loaded_decoder_is_the_saved_one(tmp_path):
    decoder = _decoder()
    save_model(decoder, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == decoder.config
    assert not loaded.training
    assert loaded.state_dict().keys() == decoder.state_dict().keys()
    for name, tensor in decoder.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=0, rtol=0)
    tokens = torch.randint(31, (3, 7))
    torch.testing.assert_close(loaded(tokens).logits, decoder.eval()(tokens).logits)


def test_saving_again_replaces_the_model_and_leaves_nothing_beside_it(tmp_path):
    save_model(_decoder(), tmp_path / "model")
    second = _decoder()
    save_model(second, tmp_path / "model")
    torch.testing.assert_close(load_model(tmp_path / "model").norm.weight, second.norm.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "manifest.json", "model.safetensors"
    }  # fmt: skip


def test_another_tokenizer_is_refused(tmp_path):
    save_model(_decoder(), tmp_path, tokenizer_fingerprint="a" * 64)
    load_model(tmp_path, tokenizer_fingerprint="a" * 64)
    load_model(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"with the tokenizer aaaaaaaaaaaa, got the tokenizer bbbbbbbbbbbb\."
    ):
        load_model(tmp_path, tokenizer_fingerprint="b" * 64)


def test_damaged_or_foreign_directories_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no model directory .*nowhere"):
        load_model(tmp_path / "nowhere")
    path = tmp_path / "model"
    save_model(_decoder(), path)
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors must have .* It was cut short"):
        load_model(path)
    weights.write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": "other"}))
    with pytest.raises(
        CheckpointError, match="must be a byheart-decoder of version 1, found other"
    ):
        load_model(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no manifest.json"):
        load_model(path)


def test_weights_of_another_shape_are_refused_and_change_nothing(tmp_path):
    save_model(_decoder(hidden_dim=17), tmp_path)
    decoder = _decoder()
    before = decoder.embedding.weight.detach().clone()
    with pytest.raises(
        CheckpointError, match=r"blocks.0.contract.weight has shape \[11, 17\], not \[11, 13\] \(4"
    ):
        load_weights(decoder, tmp_path)
    torch.testing.assert_close(decoder.embedding.weight, before)

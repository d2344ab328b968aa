import json

import pytest
import torch

from byheart.errors import CheckpointError, MemoryStateError
from byheart.memory.files import MANIFEST
from byheart.memory.persistence import load_state, save_state
from byheart.models.fingerprint import model_fingerprint
from byheart.models.streaming import read_tokens
from byheart.testing.tiny import random_tokens, tiny_config, tiny_decoder


@pytest.fixture
def decoder():
    return tiny_decoder()


@pytest.fixture
def saved(decoder, tmp_path):
    state = read_tokens(decoder, random_tokens(2, 24), decoder.new_state(2)).state
    save_state(state, tmp_path / "notes", fingerprint=model_fingerprint(decoder))
    return tmp_path / "notes"


def test_only_used_slots_are_written(decoder, tmp_path):
    sizes = []
    for length in (7, 35):
        state = read_tokens(decoder, random_tokens(2, length), decoder.new_state(2)).state
        save_state(state, tmp_path / str(length))
        sizes.append((tmp_path / str(length) / "tensors.safetensors").stat().st_size)
    # four segments of keys and values, 2 rows, 3 heads, 7 tokens, 8 numbers of 4 bytes
    assert sizes[1] - sizes[0] == pytest.approx(4 * 2 * 2 * 3 * 7 * 8 * 4, abs=200)


def test_saving_again_replaces_the_directory(decoder, saved):
    state = read_tokens(decoder, random_tokens(2, 7), decoder.new_state(2)).state
    save_state(state, saved)
    assert load_state(saved, decoder.config.memory_layout).position.tolist() == [7, 7]
    assert [path.name for path in saved.parent.iterdir()] == ["notes"]


def test_a_directory_cut_short_is_refused_by_name(decoder, saved):
    layout = decoder.config.memory_layout
    tensors = saved / "tensors.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors must have \d+ bytes"):
        load_state(saved, layout)
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="checksum differs"):
        load_state(saved, layout)
    (saved / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"notes is not complete: it has no manifest\.json"):
        load_state(saved, layout)
    with pytest.raises(CheckpointError, match="There is no directory"):
        load_state(saved / "nothing", layout)


def test_another_format_is_refused(decoder, saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(
        CheckpointError, match="version 1, found byheart-memory-state of version 99"
    ):
        load_state(saved, decoder.config.memory_layout)
    (saved / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="not a manifest that byheart wrote"):
        load_state(saved, decoder.config.memory_layout)


def test_a_state_of_another_model_is_refused(decoder, saved):
    other = tiny_config(xl_cache_length=5).memory_layout
    with pytest.raises(MemoryStateError, match=r"notes was made for another model"):
        load_state(saved, other)
    with pytest.raises(MemoryStateError, match="fingerprint"):
        load_state(
            saved,
            decoder.config.memory_layout,
            fingerprint=model_fingerprint(tiny_decoder(seed=1)),
        )


def test_a_disk_that_is_full_leaves_the_old_directory(decoder, saved, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("byheart.memory.files.save_file", full)
    state = read_tokens(decoder, random_tokens(2, 7), decoder.new_state(2)).state
    with pytest.raises(OSError, match="No space left"):
        save_state(state, saved)
    monkeypatch.undo()
    assert load_state(saved, decoder.config.memory_layout).position.tolist() == [24, 24]
    assert [path.name for path in saved.parent.iterdir()] == ["notes"]


def test_the_fingerprint_depends_on_every_weight(decoder):
    before = model_fingerprint(decoder)
    with torch.no_grad():
        decoder.blocks[1].attention.mix.gate_bias[2] += 1e-6
    assert model_fingerprint(decoder) != before

import json
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from byheart.errors import CheckpointError, MemoryStateError
from byheart.memory.config import KnnMemoryConfig
from byheart.memory.files import MANIFEST, complete_directory, read_manifest
from byheart.models.checkpoint import save_model
from byheart.models.fingerprint import model_fingerprint
from byheart.models.streaming import read_tokens
from byheart.testing.tiny import random_tokens, tiny_config, tiny_decoder


@pytest.fixture
def decoder():
    return tiny_decoder()


@pytest.fixture
def saved(decoder, tmp_path):
    state = read_tokens(decoder, random_tokens(2, 24), decoder.new_state(2)).state
    decoder.save_state(state, tmp_path / "notes")
    return tmp_path / "notes"


def test_only_used_slots_are_written(decoder, tmp_path):
    sizes = []
    for length in (7, 35):
        state = read_tokens(decoder, random_tokens(2, length), decoder.new_state(2)).state
        decoder.save_state(state, tmp_path / str(length))
        sizes.append((tmp_path / str(length) / "tensors.safetensors").stat().st_size)
    # four segments of keys and values, 2 rows, 3 heads, 7 tokens, 8 numbers of 4 bytes
    assert sizes[1] - sizes[0] == pytest.approx(4 * 2 * 2 * 3 * 7 * 8 * 4, abs=200)


def test_saving_again_replaces_the_directory(decoder, saved):
    state = read_tokens(decoder, random_tokens(2, 7), decoder.new_state(2)).state
    decoder.save_state(state, saved)
    assert decoder.load_state(saved).position.tolist() == [7, 7]
    assert [path.name for path in saved.parent.iterdir()] == ["notes"]


def test_a_directory_cut_short_is_refused_by_name(decoder, saved):
    tensors = saved / "tensors.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors must have \d+ bytes"):
        decoder.load_state(saved)
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="checksum differs"):
        decoder.load_state(saved)
    (saved / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"notes is not complete: it has no manifest\.json"):
        decoder.load_state(saved)
    with pytest.raises(CheckpointError, match="There is no directory"):
        decoder.load_state(saved / "nothing")


def test_another_format_is_refused(decoder, saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(
        CheckpointError, match="version 1, found byheart-memory-state of version 99"
    ):
        decoder.load_state(saved)
    (saved / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="not a manifest that byheart wrote"):
        decoder.load_state(saved)


def test_a_state_of_another_model_is_refused(decoder, saved):
    other = tiny_decoder(tiny_config(xl_cache_length=5))
    with pytest.raises(MemoryStateError, match=r"notes was made for another model"):
        other.load_state(saved)
    with pytest.raises(MemoryStateError, match="fingerprint"):
        tiny_decoder(seed=1).load_state(saved)


def test_a_disk_that_is_full_leaves_the_old_directory(decoder, saved, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("byheart.memory.files.save_file", full)
    state = read_tokens(decoder, random_tokens(2, 7), decoder.new_state(2)).state
    with pytest.raises(OSError, match="No space left"):
        decoder.save_state(state, saved)
    monkeypatch.undo()
    assert decoder.load_state(saved).position.tolist() == [24, 24]
    assert [path.name for path in saved.parent.iterdir()] == ["notes"]


def test_a_save_killed_between_its_two_renames_is_finished_on_loading(decoder, saved):
    state = read_tokens(decoder, random_tokens(2, 7), decoder.new_state(2)).state
    new = saved.with_name("new")
    decoder.save_state(state, new)
    # no process has this number: Linux counts to 2^22
    saved.rename(saved.with_name(".notes.old"))
    new.rename(saved.with_name(".notes.partial-99999999"))
    assert decoder.load_state(saved).position.tolist() == [7, 7]
    assert [path.name for path in saved.parent.iterdir()] == ["notes"]


def test_a_save_killed_before_its_second_rename_without_a_complete_one_keeps_the_old(
    decoder, saved
):
    partial = saved.with_name(".notes.partial-99999999")
    partial.mkdir()
    (partial / "tensors.safetensors").write_bytes(b"cut")
    saved.rename(saved.with_name(".notes.old"))
    assert decoder.load_state(saved).position.tolist() == [24, 24]
    assert [path.name for path in saved.parent.iterdir()] == ["notes"]


def test_a_disk_that_is_full_for_real_is_named(decoder, saved):
    state = read_tokens(decoder, random_tokens(2, 7), decoder.new_state(2)).state
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="notes could not be written"):
            decoder.save_state(state, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert decoder.load_state(saved).position.tolist() == [24, 24]


def test_search_and_precision_are_those_of_the_model_that_loads(decoder, saved):
    memory = KnnMemoryConfig(
        layers=(1,), memory_size=40, top_k=5, search="strided_bucket", dtype="bfloat16"
    )
    other = tiny_decoder(tiny_config(memory=memory))
    other.load_state_dict(decoder.state_dict())
    state = decoder.new_state(2, memory_size=40)
    decoder.save_state(read_tokens(decoder, random_tokens(2, 24), state).state, saved)
    store = other.load_state(saved).stores[1]
    assert store.num_buckets == 5
    assert store.keys.dtype == torch.bfloat16


def test_the_fingerprint_depends_on_every_weight(decoder):
    before = model_fingerprint(decoder)
    with torch.no_grad():
        decoder.blocks[1].attention.mix.gate_bias[2] += 1e-6
    assert model_fingerprint(decoder) != before


def test_what_byheart_did_not_write_is_not_replaced(decoder, saved, tmp_path):
    state = decoder.new_state(2)
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"notes would be .*holds tokenizer\.json, which"):
        decoder.save_state(state, saved)
    (saved / "tokenizer.json").unlink()
    (saved / "deeper").mkdir()
    decoder.save_state(state, saved)
    (saved / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"holds tensors\.safetensors, which is not part of"):
        decoder.save_state(state, saved)
    assert (saved / "tensors.safetensors").is_file()
    (saved / MANIFEST).write_text("broken")
    with pytest.raises(CheckpointError, match=r"holds manifest\.json, which"):
        decoder.save_state(state, saved)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file must be a directory, found a file"):
        decoder.save_state(state, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes"]


def test_another_format_is_not_replaced(decoder, saved):
    with pytest.raises(CheckpointError, match="not part of a byheart-decoder that byheart"):
        save_model(decoder, saved)
    assert decoder.load_state(saved).position.tolist() == [24, 24]


def test_a_file_that_comes_while_saving_is_kept(decoder, saved, monkeypatch):
    def save(tensors, path):
        save_file(tensors, path)
        (saved / "late.txt").write_text("x")

    monkeypatch.setattr("byheart.memory.files.save_file", save)
    with pytest.raises(CheckpointError, match=r"holds late\.txt"):
        decoder.save_state(decoder.new_state(2), saved)
    assert [path.name for path in saved.parent.iterdir()] == ["notes"]
    (saved / "late.txt").unlink()
    assert decoder.load_state(saved).position.tolist() == [24, 24]


def test_an_empty_directory_is_filled(decoder, tmp_path):
    (tmp_path / "empty").mkdir()
    decoder.save_state(decoder.new_state(2), tmp_path / "empty")
    assert decoder.load_state(tmp_path / "empty").position.tolist() == [0, 0]


def test_a_directory_with_a_complete_one_inside_is_replaced(tmp_path):
    for word in ("first", "second"):
        with (
            complete_directory(tmp_path / "outer", {"format": "outer"}) as partial,
            complete_directory(partial / "inner", {"format": "inner"}) as inner,
        ):
            (inner / "word").write_text(word)
    assert (tmp_path / "outer" / "inner" / "word").read_text() == "second"
    read_manifest(tmp_path / "outer" / "inner")
    (tmp_path / "outer" / "mine").mkdir()
    (tmp_path / "outer" / "mine" / MANIFEST).write_text("{}")
    with (
        pytest.raises(CheckpointError, match=r"holds mine/manifest\.json"),
        complete_directory(tmp_path / "outer", {"format": "outer"}),
    ):
        pass


def test_a_link_stays_a_link(decoder, tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to("disk/real")
    for length in (7, 14):
        state = read_tokens(decoder, random_tokens(2, length), decoder.new_state(2)).state
        decoder.save_state(state, link)
        for place in (link, tmp_path / "disk" / "real"):
            assert decoder.load_state(place).position.tolist() == [length, length]
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    # a save that was killed between its two renames is found behind a link, too
    real = tmp_path / "disk" / "real"
    real.rename(real.with_name(".real.old"))
    assert decoder.load_state(link).position.tolist() == [14, 14]
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_the_working_directory_is_not_replaced_but_read(decoder, saved, monkeypatch):
    for place, names in ((saved, (".", "../notes", str(saved))), (saved.parent, (".",))):
        monkeypatch.chdir(place)
        for name in names:
            with pytest.raises(CheckpointError, match=r"must not be the working directory.*inside"):
                decoder.save_state(decoder.new_state(2), name)
    monkeypatch.chdir(saved)
    assert decoder.load_state(".").position.tolist() == [24, 24]
    (saved / "inner").mkdir()
    monkeypatch.chdir(saved / "inner")
    with pytest.raises(CheckpointError, match="or hold it"):
        decoder.save_state(decoder.new_state(2), "..")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"files": []}', '{"files": {"x": 3}}', '{"files": {"x": {}}}']
)
def test_a_manifest_that_byheart_has_not_written_is_refused(content, tmp_path):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match="is not a manifest that byheart wrote"):
        read_manifest(tmp_path)

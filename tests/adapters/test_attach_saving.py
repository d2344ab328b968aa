"""What was added is saved alone, or with the model, and comes back exactly."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers.utils import hub as hub_of_transformers

from byheart import KnnMemoryConfig, read_tokens
from byheart.adapters import memory_saving
from byheart.adapters.attach import attach
from byheart.adapters.memory_model import MemoryModel
from byheart.errors import CheckpointError, MemoryStateError

SEGMENT = 7


def opened(model, **options):
    knn = KnnMemoryConfig(layers=(1,), memory_size=17, top_k=5)
    memory_model = attach(model, knn=knn, segment_length=SEGMENT, **options)
    with torch.no_grad():
        for weight in memory_model.memory_parameters():
            weight.add_(0.5)
    return memory_model.eval()


def logits_after(memory_model, ids):
    state = memory_model.new_state(1)
    return read_tokens(memory_model, ids, state, return_logits=True).logits


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_and_loaded_it_is_the_same(name, with_model, tiny_model, draw, tmp_path):
    memory_model = opened(tiny_model(name), xl_cache_length=SEGMENT, normalize_qk=name == "llama")
    expected = logits_after(memory_model, draw(1, 30))
    memory_model.save_pretrained(tmp_path / "saved", with_model=with_model)
    weights = load_file(tmp_path / "saved" / "memory_model.safetensors")
    assert set(weights) == {"1.log_scale", "1.gate_bias"}
    loaded = MemoryModel.from_pretrained(
        None if with_model else tiny_model(name), tmp_path / "saved"
    )
    assert loaded.memory_config == memory_model.memory_config
    assert torch.equal(logits_after(loaded, draw(1, 30)), expected)
    if with_model:
        assert not any("byheart" in name for name in loaded.detach().state_dict())


def test_a_state_goes_on_in_the_middle_of_a_document(tiny_model, draw, tmp_path):
    memory_model = opened(tiny_model("llama"), xl_cache_length=SEGMENT, normalize_qk=True)
    ids = draw(2, 30)
    whole = read_tokens(memory_model, ids, memory_model.new_state(2), return_logits=True)
    state = read_tokens(memory_model, ids[:, :17], memory_model.new_state(2)).state
    memory_model.save_state(state, tmp_path / "state")
    loaded = memory_model.load_state(tmp_path / "state")
    rest = read_tokens(memory_model, ids[:, 17:], loaded, return_logits=True)
    torch.testing.assert_close(rest.logits, whole.logits[:, 17:], atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        memory_model.memory_parameters()[0].add_(1)
    with pytest.raises(MemoryStateError, match="was made by a model with fingerprint"):
        memory_model.load_state(tmp_path / "state")


def test_a_published_memory_is_the_same(tiny_model, draw, tmp_path, monkeypatch):
    memory_model = opened(tiny_model("llama"), xl_cache_length=SEGMENT)
    expected = logits_after(memory_model, draw(1, 30))
    hub = FakeHub(tmp_path / "hub")
    hub.take_the_place_of_the_real_one(monkeypatch)
    memory_model.push_to_hub("someone/memory", private=True)
    files = {path.relative_to(hub.folder).as_posix() for path in hub.folder.rglob("*.*")}
    assert files == {
        "README.md", "manifest.json", "memory_config.json", "memory_model.safetensors",
    }  # fmt: skip
    assert hub.calls == [("create_repo", "someone/memory"), ("create_commit", "someone/memory")]
    loaded = MemoryModel.from_pretrained(tiny_model("llama"), "someone/memory")
    assert torch.equal(logits_after(loaded, draw(1, 30)), expected)
    with pytest.raises(CheckpointError, match="neither a directory nor a repository someone/other"):
        MemoryModel.from_pretrained(tiny_model("llama"), "someone/other")


class FakeHub:
    """The Hugging Face hub as a folder: one repository, and nothing goes over a network."""

    def __init__(self, folder):
        self.folder, self.name, self.calls = folder, None, []

    def create_repo(self, repo_id, **_):
        self.name = repo_id
        self.calls.append(("create_repo", repo_id))
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **_):
        self.calls.append(("create_commit", repo_id))
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, path)

    def snapshot_download(self, repo_id):
        if repo_id != self.name:
            msg = "404"
            raise OSError(msg)
        return str(self.folder)

    def take_the_place_of_the_real_one(self, monkeypatch):
        card = ModelCard("---\n---\n# A memory\n")
        monkeypatch.setattr(hub_of_transformers, "create_and_tag_model_card", lambda *_, **__: card)
        # the first name is new in transformers 5.18 or later
        if hasattr(hub_of_transformers, "hf_api"):
            monkeypatch.setattr(hub_of_transformers, "hf_api", lambda: self)
        else:
            for name in ("create_repo", "create_commit"):
                monkeypatch.setattr(hub_of_transformers, name, getattr(self, name))
        monkeypatch.setattr(memory_saving, "snapshot_download", self.snapshot_download)


def test_another_model_is_refused(tiny_model, tmp_path):
    opened(tiny_model("llama")).save_pretrained(tmp_path / "saved")
    other = tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    with pytest.raises(CheckpointError, match="a llama model with other weights"):
        MemoryModel.from_pretrained(other, tmp_path / "saved")
    assert MemoryModel.from_pretrained(other, tmp_path / "saved", check_model=False).detach()
    with pytest.raises(CheckpointError, match="belongs to a model of type llama, got gpt2"):
        MemoryModel.from_pretrained(tiny_model("gpt2"), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="holds the memory alone"):
        MemoryModel.from_pretrained(None, tmp_path / "saved")


def test_damaged_weights_are_refused_and_the_model_is_left_alone(tiny_model, tmp_path):
    opened(tiny_model("llama")).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "memory_model.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    with pytest.raises(CheckpointError, match=r"memory_model\.safetensors"):
        MemoryModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")


def test_weights_that_do_not_fit_are_refused_and_the_model_is_left_alone(tiny_model, tmp_path):
    memory_model = opened(tiny_model("llama"))
    memory_model.save_pretrained(tmp_path / "saved")
    manifest = tmp_path / "saved" / "manifest.json"
    content = json.loads(manifest.read_text())
    save_file({"9.gate_bias": torch.zeros(4)}, tmp_path / "saved" / "memory_model.safetensors")
    content["files"].pop("memory_model.safetensors")
    manifest.write_text(json.dumps(content))
    model = tiny_model("llama")
    with pytest.raises(CheckpointError, match="does not fit its config"):
        MemoryModel.from_pretrained(model, tmp_path / "saved")
    assert not any("byheart" in name for name in model.state_dict())


def test_a_model_that_has_learned_is_saved_along(tiny_model, draw, tmp_path):
    memory_model = opened(tiny_model("llama"))
    memory_model.save_pretrained(tmp_path / "memory")
    assert not (tmp_path / "memory" / "model").exists()
    with torch.no_grad():
        memory_model.model.lm_head.weight.add_(0.1)
    memory_model.save_pretrained(tmp_path / "both")
    loaded = MemoryModel.from_pretrained(None, tmp_path / "both")
    assert torch.equal(logits_after(loaded, draw(1, 9)), logits_after(memory_model, draw(1, 9)))


def names_in(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.*"))


def trained(model):
    memory_model = opened(model)
    with torch.no_grad():
        memory_model.model.lm_head.weight.add_(0.1)
    return memory_model


@pytest.mark.parametrize("pass_model", [False, True])
def test_a_model_that_was_saved_along_is_saved_along_again(pass_model, tiny_model, draw, tmp_path):
    memory_model = trained(tiny_model("llama"))
    expected = logits_after(memory_model, draw(1, 9))
    memory_model.save_pretrained(tmp_path / "both")
    files = names_in(tmp_path / "both")
    model = memory_model.detach() if pass_model else None
    loaded = MemoryModel.from_pretrained(model, tmp_path / "both")
    for place in ("both", "elsewhere"):
        loaded.save_pretrained(tmp_path / place)
        assert names_in(tmp_path / place) == files
        again = MemoryModel.from_pretrained(None, tmp_path / place)
        assert torch.equal(logits_after(again, draw(1, 9)), expected)


def test_a_folder_with_a_model_goes_on_having_one(tiny_model, tmp_path):
    trained(tiny_model("llama")).save_pretrained(tmp_path / "both")
    model = MemoryModel.from_pretrained(None, tmp_path / "both").detach()
    opened(model, xl_cache_length=SEGMENT).save_pretrained(tmp_path / "both")
    loaded = MemoryModel.from_pretrained(None, tmp_path / "both")
    assert loaded.memory_config.xl_cache_length == SEGMENT


def by_data(memory_model):
    memory_model.model.lm_head.weight.data.add_(0.1)


def one_number_by_data(memory_model):
    memory_model.model.lm_head.weight.data[3, 5] += 1e-3


def two_rows_change_places(memory_model):
    weight = memory_model.model.lm_head.weight
    weight.data[[3, 5]] = weight.data[[5, 3]]


def another_tensor(memory_model):
    head = memory_model.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.1)


@pytest.mark.parametrize(
    "change", [by_data, one_number_by_data, two_rows_change_places, another_tensor]
)
@pytest.mark.parametrize("copied", [False, True])
def test_weights_that_have_changed_in_any_way_are_saved(change, copied, tiny_model, draw, tmp_path):
    memory_model = opened(tiny_model("llama"))
    assert not memory_model.has_learned
    change(memory_model)
    if copied:
        memory_model = copy.deepcopy(memory_model)
    assert memory_model.has_learned
    memory_model.save_pretrained(tmp_path / "both")
    loaded = MemoryModel.from_pretrained(None, tmp_path / "both")
    assert torch.equal(logits_after(loaded, draw(1, 9)), logits_after(memory_model, draw(1, 9)))


def test_weights_that_were_written_as_they_are_have_learned_nothing(tiny_model):
    memory_model = opened(tiny_model("llama"))
    memory_model.load_state_dict(memory_model.state_dict())
    assert not memory_model.has_learned


def test_a_model_and_a_tokenizer_in_the_folder_are_not_lost(tiny_model, tmp_path):
    memory_model = opened(tiny_model("llama"))
    tiny_model("llama").save_pretrained(tmp_path / "mine")
    files = names_in(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"holds config\.json, which is not part of a"):
        memory_model.save_pretrained(tmp_path / "mine")
    assert names_in(tmp_path / "mine") == files


def test_options_of_saving_are_heeded_or_refused(tiny_model, draw, tmp_path):
    memory_model = opened(tiny_model("llama"))
    memory_model.save_pretrained(tmp_path / "none", is_main_process=False)
    with pytest.raises(TypeError, match=r"got push_to_hub\. Leave it out; to publish"):
        memory_model.save_pretrained(tmp_path / "none", push_to_hub=True)
    assert not list(tmp_path.iterdir())
    # as push_to_hub calls it
    memory_model.save_pretrained(tmp_path / "parts", with_model=True, max_shard_size="3KB")
    assert len(list((tmp_path / "parts" / "model").glob("*.safetensors"))) > 1
    loaded = MemoryModel.from_pretrained(None, tmp_path / "parts")
    assert torch.equal(logits_after(loaded, draw(1, 9)), logits_after(memory_model, draw(1, 9)))

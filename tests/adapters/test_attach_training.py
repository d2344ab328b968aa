"""Ways to train a model with memory: compiled, with LoRA, in several processes."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from byheart import KnnMemoryConfig, read_tokens
from byheart.adapters.attach import attach
from byheart.adapters.memory_model import MemoryModel
from byheart.errors import CheckpointError

SEGMENT = 7
HERE = Path(__file__).parent


def make(model, **options):
    knn = KnnMemoryConfig(layers=(1,), memory_size=17, top_k=5, age_slope=0.5)
    return attach(model, knn=knn, segment_length=SEGMENT, **options)


def learn(memory_model, ids):
    state, logits = memory_model.new_state(len(ids)), []
    for segment in ids.split(SEGMENT, dim=1):
        out = memory_model(segment, labels=segment, state=state)
        out.loss.backward()
        state = state.commit(out.new_entries)
        logits.append(out.logits.detach())
    return torch.cat(logits, 1), [weight.grad for weight in memory_model.parameters()]


def interprets_kernels():
    # the interpreter of 3.6 fails with NumPy 2.4
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return False
    return not torch.cuda.is_available() and tuple(map(int, version.split(".")[:2])) >= (3, 7)


@pytest.mark.slow
def test_compiled_without_a_break_it_computes_the_same():
    # family, layers, length of the XL cache; in one process, as importing takes longer than a case
    cases = ["llama,2,7", "gpt2,1,0", "gemma3,1,7"]
    # last, as it uses them from then on
    cases += ["llama,1,7,kernels"] * interprets_kernels()
    command = [sys.executable, str(HERE / "attached_compiled.py"), *cases]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    if not interprets_kernels():
        pytest.skip("all but kernels was checked: they need Triton 3.7, and no GPU")


# PEFT 0.21 asks transformers 5.23 by the older of two names
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_learns_and_keeps_the_memory_along(tiny_model, draw, tmp_path):
    memory_model = make(tiny_model("llama"), xl_cache_length=SEGMENT)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["byheart_memory"]
    )
    adapted = peft.get_peft_model(memory_model.model, config)
    before = {name: weight.clone() for name, weight in memory_model.named_parameters()}
    learning = [weight for weight in memory_model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1.0)
    ids = draw(2, 28)
    learn(memory_model, ids)
    optimizer.step()
    changed = {
        name.rpartition(".")[2] if "lora" not in name else "lora"
        for name, weight in memory_model.named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert changed == {"lora", "gate_bias"}  # with closed gates the scale has no gradient yet
    expected = read_tokens(memory_model, ids, memory_model.new_state(2), return_logits=True)
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("byheart_memory" in name for name in saved) == 2
    again = make(tiny_model("llama"), xl_cache_length=SEGMENT)
    peft.PeftModel.from_pretrained(again.model, tmp_path)
    read = read_tokens(again, ids, again.new_state(2), return_logits=True)
    assert torch.equal(read.logits, expected.logits)
    with pytest.raises(ValueError, match=r"Save it with PEFT's save_pretrained"):
        memory_model.save_pretrained(tmp_path / "memory")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("modules_to_save", [None, ["byheart_memory"]])
def test_lora_is_saved_once_it_is_merged(modules_to_save, tiny_model, draw, tmp_path):
    memory_model = make(tiny_model("llama")).eval()
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=modules_to_save, init_lora_weights=False
    )
    adapted = peft.get_peft_model(memory_model.model, config)
    if modules_to_save is None:
        message = r"layers of PEFT, such as model\.layers\.0\.self_attn\.q_proj.*merge_and_unload"
        with pytest.raises(ValueError, match=message):
            memory_model.save_pretrained(tmp_path / "memory")
        assert not (tmp_path / "memory").exists()
    adapted.merge_and_unload()
    ids = draw(1, SEGMENT)
    expected = memory_model(ids).logits
    memory_model.save_pretrained(tmp_path / "memory")
    loaded = MemoryModel.from_pretrained(None, tmp_path / "memory")
    assert torch.equal(loaded(ids).logits, expected)
    with pytest.raises(CheckpointError, match="with other weights"):
        MemoryModel.from_pretrained(tiny_model("llama"), tmp_path / "memory")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_memory_on_an_adapted_model_is_saved_alone(tiny_model, draw, tmp_path):
    def adapted():
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        return peft.get_peft_model(tiny_model("llama"), config).get_base_model().eval()

    memory_model = make(adapted()).eval()
    memory_model.save_pretrained(tmp_path)
    loaded = MemoryModel.from_pretrained(adapted(), tmp_path)
    ids = draw(1, SEGMENT)
    assert torch.equal(loaded(ids).logits, memory_model(ids).logits)


@pytest.mark.slow
def test_two_processes_keep_their_memories_apart(tmp_path):
    command = [sys.executable, str(HERE / "attached_processes.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    sys.path.insert(0, str(HERE))
    import attached_processes as script

    sys.path.remove(str(HERE))
    memory_model = script.make_model()
    optimizer = torch.optim.SGD(memory_model.parameters(), lr=0.1)
    states = [memory_model.new_state(2) for _ in range(2)]
    for segments in zip(script.segments_of(0), script.segments_of(1), strict=True):
        for rank, segment in enumerate(segments):
            out = memory_model(segment, labels=segment, state=states[rank])
            (out.loss / 2).backward()
            states[rank] = states[rank].commit(out.new_entries)
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(2):
        saved = load_file(tmp_path / f"{rank}.safetensors")
        for name, weight in memory_model.named_parameters():
            torch.testing.assert_close(saved[f"weight.{name}"], weight, atol=1e-6, rtol=1e-5)
        for name, tensor in states[rank].stores[1].state_dict().items():
            torch.testing.assert_close(saved[name], tensor, atol=1e-5, rtol=1e-5)
    assert not torch.equal(states[0].stores[1].keys, states[1].stores[1].keys)


def test_the_trainer_evaluates_and_predicts_without_the_new_entries(tiny_model, draw, tmp_path):
    memory_model = make(tiny_model("llama")).eval()
    rows = [{"input_ids": row, "labels": row} for row in draw(5, SEGMENT)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, per_device_train_batch_size=5,
        max_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    seen = []
    trainer = Trainer(
        memory_model, arguments, train_dataset=rows, eval_dataset=rows,
        compute_metrics=lambda found: seen.append(found.predictions) or {},
    )  # fmt: skip
    # what docs/attach.md says
    ignored = ["new_entries", "token_losses"]
    trainer.train(ignore_keys_for_eval=ignored)
    trainer.evaluate(ignore_keys=ignored)
    found = trainer.predict(rows, ignore_keys=ignored)
    with torch.no_grad():
        out = memory_model.eval()(draw(5, SEGMENT), labels=draw(5, SEGMENT))
    for predictions in (*seen, found.predictions):
        torch.testing.assert_close(torch.from_numpy(predictions), out.logits)
    # a Trainer without it counts the first label of each row, too, which nothing predicts
    if hasattr(trainer, "_loss_shifts_labels"):
        assert found.metrics["test_loss"] == pytest.approx(float(out.loss), rel=1e-5)

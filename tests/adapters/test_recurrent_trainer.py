"""Recurrent memory under transformers' own Trainer."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from byheart.adapters.attach import attach
from byheart.memory.config import KnnMemoryConfig
from byheart.models.config import DecoderConfig
from byheart.models.decoder import Decoder

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def documents(kind, draw):
    """Four documents, of which the first pair has far fewer labels than the second."""
    ids = draw(4, 17)
    if kind == "encoder":
        return [{"input_ids": row, "labels": row[0] % 5} for row in ids]
    labels = ids[:, :9].clone() if kind == "encoder-decoder" else ids.clone()
    labels[:2, 4:] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def trained(memory_model, rows, folder, *, batch_size):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(rows) // batch_size,
        max_steps=1,
        learning_rate=0.1,
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=memory_model, args=arguments, train_dataset=rows)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_accumulated_micro_batches_train_as_one_batch(name, tiny_model, wrap, draw, tmp_path):
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    off = {
        "gpt2": off,
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "t5": {"dropout_rate": 0.0},
    }[name]
    whole, parts = (wrap(tiny_model(name, **off)) for _ in range(2))
    rows = documents(whole.kind, draw)

    losses = [
        trained(whole, rows, tmp_path, batch_size=4),
        trained(parts, rows, tmp_path, batch_size=1),
    ]

    close(*losses, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        close(mine, theirs)


def test_predictions_leave_the_memory_out(tiny_model, wrap, draw, tmp_path):
    memory_model = wrap(tiny_model("bert"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    rows = documents("encoder", draw)

    found = Trainer(model=memory_model, args=arguments).predict(rows, ignore_keys=["new_entries"])

    with torch.no_grad():
        expected = memory_model(torch.stack([row["input_ids"] for row in rows])).logits
    close(torch.tensor(found.predictions), expected)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_checkpoints_hold_tied_weights_once(name, tiny_model, wrap, draw, tmp_path):
    memory_model = wrap(tiny_model(name))
    rows = documents(memory_model.kind, draw)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, save_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=memory_model, args=arguments, train_dataset=rows)
    trainer.train()

    other = wrap(tiny_model(name))
    other.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"))

    for mine, theirs in zip(other.parameters(), memory_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert other.model.get_output_embeddings().weight is other.model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["llama", "bert", "attached", "attached alone"])
def test_smoothed_labels_are_those_of_the_model_inside(name, tiny_model, wrap, draw, tmp_path):
    # the Trainer pops the labels, and moves them by one for the language models that it knows
    ids = draw(2, 7)
    labels = torch.tensor([1, 2]) if name == "bert" else ids
    if name.startswith("attached"):
        knn = KnnMemoryConfig(layers=(1,), memory_size=16, top_k=4)
        memory_model = attach(tiny_model("llama"), knn=knn, segment_length=13)
        memory_model = memory_model if name.endswith("alone") else wrap(memory_model)
    else:
        memory_model = wrap(tiny_model(name))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip

    trainer = Trainer(model=memory_model, args=arguments)
    loss = trainer.compute_loss(memory_model, {"input_ids": ids, "labels": labels})

    logits = memory_model(ids).logits
    if name != "bert":
        logits, labels = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    close(loss, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))


def test_it_prints_by_its_own_name(tiny_model, wrap):
    knn = KnnMemoryConfig(layers=(1,), memory_size=16, top_k=4)
    attached = attach(tiny_model("llama"), knn=knn, segment_length=7)
    assert repr(attached).startswith("MemoryModel(\n  (model): LlamaForCausalLM(")
    lines = repr(wrap(tiny_model("bert"))).splitlines()
    assert lines[:2] == ["RecurrentMemory(", "  (model): BertForSequenceClassification("]


def test_gradient_checkpointing_is_that_of_the_model_inside(tiny_model, wrap, draw, tmp_path):
    ids, found = draw(2, 17), []
    for checkpointing in (False, True):
        memory_model = wrap(tiny_model("llama"), replay=checkpointing).train()
        if checkpointing:
            memory_model.activation_checkpointing_enable()
            assert any(
                getattr(module, "gradient_checkpointing", False)
                for module in memory_model.modules()
            )
        memory_model(ids, labels=ids).loss.backward()
        found.append([weight.grad for weight in memory_model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs)


def test_gradient_checkpointing_needs_a_model_that_has_it(wrap):
    config = DecoderConfig(
        vocab_size=9, num_layers=1, embed_dim=16, num_heads=2, head_dim=8, hidden_dim=24,
        segment_length=13, xl_cache_length=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Decoder has no gradient checkpointing\. Leave it off"):
        wrap(Decoder(config)).gradient_checkpointing_enable()

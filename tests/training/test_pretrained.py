"""A pretrained model with memory trains, resumes and is evaluated like a decoder."""

import json
from dataclasses import replace

import pytest
import torch
from training_setup import VOCAB, make_dataset, training_config
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from byheart import read_tokens
from byheart.adapters.attach import attach
from byheart.adapters.memory_saving import load_attached
from byheart.data.rows import collate
from byheart.data.token_cache import tokenize_corpus
from byheart.data.tokenize import ByteTokenizer
from byheart.errors import CheckpointError
from byheart.memory.config import KnnMemoryConfig
from byheart.training.arguments import training_arguments
from byheart.training.config import (
    EvaluationConfig,
    ModelConfig,
    PretrainedConfig,
)
from byheart.training.models import make_model
from byheart.training.run import train
from byheart.training.trainer import MemoryTrainer
from byheart.training.wrapper import TrainedModel


@pytest.fixture
def run(attached_run):
    return attached_run


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines
    ]


def test_it_learns_and_is_loaded_again(run, llama, tmp_path):
    result = train(run, tmp_path / "run")
    lines = losses(tmp_path / "run")
    assert lines[0]["gate/layer1/mean"] == 0
    assert lines[-2]["gate/layer1/max"] != 0
    assert lines[-1]["evaluation/nats_per_token/memory_23"] < 5.7
    loaded = load_attached(None, result.model_dir)
    before = LlamaForCausalLM.from_pretrained(llama)
    assert not torch.equal(loaded.model.lm_head.weight, before.lm_head.weight)
    assert loaded.memory_parameters()[0].abs().sum() > 0


def test_resumed_it_is_the_run_that_was_never_stopped(run, tmp_path):
    run = replace(run, training=replace(run.training, schedule="constant"))
    train(run, tmp_path / "whole")
    short = replace(run, training=replace(run.training, max_steps=3))
    train(short, tmp_path / "parts")
    train(run, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    memory = replace(run.pretrained.memory, xl_cache_length=0)
    other = replace(run, pretrained=replace(run.pretrained, memory=memory))
    with pytest.raises(CheckpointError, match="xl_cache_length"):
        train(other, tmp_path / "parts", resume=True)


def test_the_memory_alone_learns_if_wanted(run, llama, tmp_path):
    run = replace(run, pretrained=replace(run.pretrained, trains="memory"))
    result = train(run, tmp_path / "run")
    loaded = load_attached(None, result.model_dir)
    before = LlamaForCausalLM.from_pretrained(llama)
    model = loaded.detach()
    for mine, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layers_with_a_memory_learn_if_wanted(layer, run, llama, tmp_path):
    memory = replace(run.pretrained.memory, knn=KnnMemoryConfig(layers=(layer,), top_k=4))
    pretrained = replace(run.pretrained, trains="memory_layers", memory=memory)
    result = train(replace(run, pretrained=pretrained), tmp_path / "run")
    loaded = load_attached(None, result.model_dir)
    assert all(weight.abs().sum() > 0 for weight in loaded.memory_parameters())
    before = dict(LlamaForCausalLM.from_pretrained(llama).named_parameters())
    changed = {
        name.removeprefix(f"model.layers.{layer}.")
        for name, weight in loaded.detach().named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert changed == {
        name.removeprefix("model.layers.0.") for name in before if "layers.0." in name
    }


@pytest.mark.parametrize("trains", ["memory", "memory_layers"])
def test_a_memory_that_learns_alone_must_be_there(trains):
    with pytest.raises(ValueError, match=rf"trains='{trains}' needs a kNN memory, got memory.knn="):
        PretrainedConfig(path="folder", trains=trains)


def test_from_scratch_the_weights_are_new_and_the_seed_decides(run, llama, tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        scratch = replace(
            run,
            pretrained=replace(run.pretrained, from_scratch=True),
            training=replace(run.training, max_steps=1, seed=seed),
        )
        result = train(scratch, tmp_path / name)
        weights.append(load_attached(None, result.model_dir).model.lm_head.weight)
    before = LlamaForCausalLM.from_pretrained(llama).lm_head.weight
    assert torch.equal(weights[0], weights[1])
    assert (weights[0] - before).abs().mean() > 1e-3
    assert not torch.equal(weights[0], weights[2])


def test_what_does_not_fit_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="either a model or a pretrained one, got both"):
        replace(run, model=ModelConfig.preset("tiny"))
    with pytest.raises(ValueError, match="got neither"):
        replace(run, pretrained=None)
    with pytest.raises(
        CheckpointError, match=r"must be a folder with config.json and weights .* got nowhere"
    ):
        train(replace(run, pretrained=replace(run.pretrained, path="nowhere")), tmp_path / "run")
    small = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4,
        )
    )  # fmt: skip
    small.save_pretrained(tmp_path / "small")
    path = str(tmp_path / "small")
    with pytest.raises(ValueError, match="at most the 30 tokens of"):
        train(replace(run, pretrained=replace(run.pretrained, path=path)), tmp_path / "run")


@pytest.mark.parametrize("from_scratch", [False, True])
def test_a_checkpoint_in_half_precision_is_trained_in_float32(from_scratch, run, llama, tmp_path):
    half = LlamaForCausalLM.from_pretrained(llama).to(torch.bfloat16)
    half.save_pretrained(llama)
    assert json.loads((llama / "config.json").read_text())["dtype"] == "bfloat16"
    # steps that bfloat16 would round away
    run = replace(
        run,
        pretrained=replace(run.pretrained, from_scratch=from_scratch),
        training=replace(run.training, max_steps=2, learning_rate=1e-7, weight_decay=0.0),
    )
    torch.manual_seed(run.training.seed)
    before = make_model(run, 256)
    assert {weight.dtype for weight in before.parameters()} == {torch.float32}
    assert before.cache_dtype == torch.float32
    result = train(run, tmp_path / "run")
    after = load_attached(None, result.model_dir)
    assert {weight.dtype for weight in after.parameters()} == {torch.float32}
    weights = [one.model.lm_head.weight for one in (before, after)]
    change = (weights[0] - weights[1]).abs().max().item()
    assert 0 < change < 1e-6
    if not from_scratch:
        torch.testing.assert_close(weights[0], half.lm_head.weight.float(), atol=0, rtol=0)
    # a run goes on with the weights as they were
    longer = replace(run, training=replace(run.training, max_steps=3))
    assert train(longer, tmp_path / "run", resume=True).resumed_from == 2


def test_documents_of_a_row_are_kept_apart(tmp_path):
    torch.manual_seed(5)
    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    memory_model = attach(
        LlamaForCausalLM(shape), knn=KnnMemoryConfig(layers=(1,), memory_size=23, top_k=4),
        segment_length=7, xl_cache_length=7, gate_init=0.5,
    )  # fmt: skip
    with torch.no_grad():
        for weight in memory_model.model.parameters():
            # so that attention is not flat
            weight.mul_(8) if weight.ndim > 1 else None
    # steps so small that the model stays what it is
    config = training_config(max_steps=20, rows_per_device=1, learning_rate=1e-12)
    dataset = make_dataset(config)
    alone, mixed, read = [], [], torch.zeros(1, 0, dtype=torch.long)
    for item in map(dataset.__getitem__, range(20)):
        new, labels = (item[name][None, : item["num_tokens"]] for name in ("input_ids", "labels"))
        read = new if item["document_start"] else torch.cat([read, new], dim=1)
        for kept, losses_of in ((read, alone), (torch.cat([draw_before(), read], 1), mixed)):
            state = memory_model.new_state(1)
            logits = read_tokens(memory_model, kept, state, return_logits=True).logits
            loss = torch.nn.functional.cross_entropy(logits[0, -new.shape[1] :], labels[0])
            losses_of.append(loss.item())
    assert sum(int(dataset[step]["document_start"]) for step in range(20)) > 2
    MemoryTrainer(
        memory_model, dataset, config, training_arguments(config, tmp_path), identity={}
    ).train()
    found = [line["loss"] for line in losses(tmp_path)]
    assert found == pytest.approx(alone, abs=2e-5)
    assert max(abs(a - b) for a, b in zip(alone, mixed, strict=True)) > 1e-3
    batch = {**collate([dataset[0]]), "state": memory_model.new_state(1)}
    del batch["document_start"]
    with pytest.raises(ValueError, match="document_start must be given: without it a document"):
        TrainedModel(memory_model)(**batch)


def test_documents_beyond_the_last_position_are_refused_before_the_first_step(run, tmp_path):
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    run = replace(run, pretrained=replace(run.pretrained, path=str(tmp_path / "gpt2")))
    with pytest.raises(ValueError, match=r"64 positions .* Cut them with evaluation.max_tokens"):
        train(run, tmp_path / "run")
    # what is not evaluated may be longer
    run = replace(run, evaluation=EvaluationConfig(max_tokens=64))
    with pytest.raises(ValueError, match=r"64 positions .* Cut documents with data.max_document"):
        train(run, tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run = replace(run, data=replace(run.data, max_document_tokens=60))
    assert train(run, tmp_path / "run", overwrite=True).steps == 6


def draw_before():
    """A whole segment of another document."""
    return torch.randint(VOCAB, (1, 7), generator=torch.Generator().manual_seed(1))


def test_short_texts_are_measured_before_and_after(run, llama, tmp_path):
    run = replace(run, evaluation=EvaluationConfig(short_tokens=9, rows=2))
    result = train(run, tmp_path / "run")
    evaluations = [line for line in losses(tmp_path / "run") if "loss" not in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    before, after = result.evaluation_before, result.evaluation
    # what the model alone says of the first tokens
    alone = LlamaForCausalLM.from_pretrained(llama)
    corpus = tokenize_corpus(run.data.validation, ByteTokenizer(), tmp_path / "cache")
    nats, count = 0.0, 0
    for index in range(corpus.num_documents):
        ids = torch.from_numpy(corpus.document(index)[:9].astype(int))[None]
        with torch.no_grad():
            nats += float(alone(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert before["nats_per_token/short"] == pytest.approx(nats / count, abs=1e-5)
    assert after["nats_per_token/short"] < before["nats_per_token/short"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["evaluation_before"] == before
    # resuming neither measures the beginning again nor forgets it
    steps = replace(run, training=replace(run.training, max_steps=8))
    resumed = train(steps, tmp_path / "run", resume=True)
    assert resumed.evaluation_before == before


def test_layers_computed_again_give_the_same_run(run, tmp_path):
    train(run, tmp_path / "kept")
    changed = replace(run.pretrained, gradient_checkpointing=True)
    again = replace(run, pretrained=changed)
    train(again, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")
    # a run may go on with the other setting
    longer = replace(again, training=replace(run.training, max_steps=7))
    assert train(longer, tmp_path / "kept", resume=True).resumed_from == 6

"""`byheart train attach`: a memory on a pretrained model, from the command line."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ModernBertConfig

from byheart.data.tokenize import BpeTokenizer

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "while",
    "a",
    "dog",
    "ran",
    "to",
    "the",
    "gate",
    "and",
    "back",
    "again",
]
LAYER_9 = "--set=pretrained.memory.knn.layers=[9]"


@pytest.fixture
def model(tmp_path):
    """A model and its tokenizer in one folder, as the hub has them."""
    text = " ".join(WORDS[i * i % len(WORDS)] for i in range(400))
    tokenizer = BpeTokenizer.train([text], 270)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=270, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save(tmp_path / "llama")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text(text, encoding="utf-8")
    return tmp_path / "llama"


def test_train_evaluate_and_generate(command, model, tmp_path):
    code, out, err = command(
        "train", "attach", "--model", model, "--data", tmp_path / "texts", "--validation",
        tmp_path / "texts", "--out", tmp_path / "run", "--json",
        "--set=pretrained.memory.segment_length=16", "--set=pretrained.memory.xl_cache_length=16",
        "--set=training.max_steps=4", "--set=training.precision=float32",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["steps"] == 4
    code, out, err = command("evaluate", tmp_path / "run", "--memory-size", "0,64", "--json")
    assert code == 0, err
    assert [m["memory_size"] for m in json.loads(out)["measurements"]] == [0, 64]
    code, out, err = command(
        "generate", tmp_path / "run", "--read", tmp_path / "texts" / "one.txt", "--prompt", "the",
        "--max-new-tokens", "40", "--save-memory", tmp_path / "memory",
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith("the")
    code, _, err = command(
        "generate", tmp_path / "run", "--memory", tmp_path / "memory", "--prompt", "a dog"
    )
    assert code == 0, err


def test_standard_error_has_no_bars_without_a_terminal_and_each_warning_once(model):
    script = (
        "import logging\n"
        "from byheart.cli import doctor\n"
        "from byheart.cli.main import main\n"
        "def warn(text):\n"
        "    from transformers import AutoModelForCausalLM\n"
        f"    AutoModelForCausalLM.from_pretrained({str(model)!r})\n"
        "    logging.getLogger('huggingface_hub.file').warning('of the hub')\n"
        "    logging.getLogger('byheart.file').warning('of byheart')\n"
        "    raise ValueError('done')\n"
        "doctor.parse_size = warn\n"
        "main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "doctor", model], capture_output=True, text=True, check=False
    )
    assert result.stderr.splitlines() == ["of the hub", "WARNING: of byheart", "error: done"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["attach", "--data", "x"], 2, "needs a pretrained model: pass --model FOLDER"),
        (["text", "--data", "x", "--model", "y"], 2, "for recipes with a pretrained model"),
        (["rmt-memorize", "--model", "y"], 2, "for recipes that learn documents"),
        (
            ["attach", "--model", "MODEL", "--data", "TEXTS", LAYER_9], 1,
            "knn.layers must be between 0 and 3",
        ),
        (
            ["attach", "--model", "TEXTS", "--data", "TEXTS"], 1,
            "texts: it has no config.json. Check the path.",
        ),
        (
            ["attach", "--model", "WRONG", "--data", "TEXTS"], 1,
            "config.json and weights of a Hugging Face model, got WRONG: there is no such folder",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(command, model, tmp_path, arguments, code, message):
    places = {"MODEL": str(model), "TEXTS": str(tmp_path / "texts")}
    arguments = [places.get(argument, argument) for argument in arguments]
    got, _, err = command("train", *arguments, "--out", tmp_path / "run")
    assert got == code
    assert places.get(message, message) in err


def test_the_doctor(command, model):
    code, out, err = command("doctor", model, "--layers", "2", "--memory-size", "1K")
    assert code == 0, err
    assert "can have a kNN memory" in out
    assert "Memory in model.layers.2.self_attn: 0.1 MiB per row" in out
    assert re.search(
        r"adds about [\d.]+ microseconds to the [\d.]+ of a token on this machine", out
    )
    assert "A document of" not in out
    code, out, err = command("doctor", model, "--memory-size", "1K", "--tokens", "128K")
    assert code == 0, err
    assert re.search(r"131,072 tokens: about [\d.]+ s without memory and [\d.]+ s with it \(", out)
    code, out, _ = command("doctor", model, "--memory-size", "0", "--tokens", "128K")
    assert re.search(r"131,072 tokens: about [\d.]+ s without memory\.", out)
    code, out, _ = command("doctor", model, "--set", "knn.store=faiss", "--tokens", "128K")
    assert "for the store 'dense' alone" in out
    code, out, err = command("doctor", model, "--tokens", "128K", "--json")
    assert code == 0, err
    document = json.loads(out)["document"]
    assert document["num_tokens"] == 131_072
    assert all(seconds > 0 for seconds in document["model_and_memory_seconds"])
    code, out, _ = command("doctor", model, "--set", "knn.combine=gate", "--json")
    assert code == 0
    assert json.loads(out)["memory_layers"] == ["model.layers.0.self_attn"]
    for arguments, message in (
        (["--layers", "x"], "must be numbers"),
        (["--layers", "9"], "--layers must be between 0 and 3, or count from the end between -4"),
        (["--set", "knn.layers=[-5]"], "and -1, for a model of 4 layers, got -5"),
        (["--memory-size", "1,2"], "must be one size"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--tokens", "1,2"], "--tokens must be one size"),
        (["--set", "gate=wide"], "gate"),
    ):
        code, _, err = command("doctor", model, *arguments)
        assert code == 2
        assert message in err


def test_the_doctor_takes_shallow_models_and_sends_encoders_elsewhere(command, tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(intermediate_size=8, vocab_size=99, **shape).save_pretrained(tmp_path / "llama")
    code, out, err = command("doctor", tmp_path / "llama")
    assert code == 0, err
    assert "Memory in model.layers.0.self_attn" in out
    ModernBertConfig(intermediate_size=8, vocab_size=99, **shape).save_pretrained(tmp_path / "bert")
    code, out, _ = command("doctor", tmp_path / "bert")
    assert code == 1
    assert "(modernbert) cannot have a kNN memory." in out
    assert "can have a recurrent memory: byheart.RecurrentMemory" in out
    assert "GPT2Config" not in out

"""Tiny Hugging Face models of many families, with random weights that make attention uneven."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from byheart.adapters.recurrent import RecurrentMemory
from byheart.models.recurrent_config import RecurrentMemoryConfig

# for `recurrent_states`
sys.path.append(str(Path(__file__).parent))

VOCAB = 43
LABELS = 5

_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": LABELS,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table: how to make a tiny model, and how it reads."""

    name: str
    config: str
    model: str
    kind: str
    settings: dict[str, Any]

    def build(self, **changes: Any) -> PreTrainedModel:
        config = getattr(transformers, self.config)(
            vocab_size=VOCAB, **{**self.settings, **changes}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
                    parameter.copy_(
                        torch.randn_like(parameter) * spread
                        + (parameter if parameter.ndim == 1 else 0)
                    )
        return model


def _decoder(name: str, config: str, model: str, settings: dict[str, Any]) -> Family:
    return Family(name=name, config=config, model=model, kind="decoder", settings=settings)


def _encoder(name: str, config: str, model: str, settings: dict[str, Any]) -> Family:
    return Family(name=name, config=config, model=model, kind="encoder", settings=settings)


_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 2}
_GEMMA = {**_LLAMA, "head_dim": 8}
# the second layer, which has the memory in most tests, is of the kind that comes every so many
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
# 1 is a layer with rotation
_SMOLLM = {"no_rope_layers": [1, 0]}

FAMILIES = (
    _decoder("gpt2", "GPT2Config", "GPT2LMHeadModel", _GPT2),
    _decoder("llama", "LlamaConfig", "LlamaForCausalLM", _LLAMA),
    _decoder("qwen2", "Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    _decoder("qwen3", "Qwen3Config", "Qwen3ForCausalLM", _GEMMA),
    _decoder("mistral", "MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": 64}),
    _decoder("gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", _LLAMA),
    _decoder(
        "opt",
        "OPTConfig",
        "OPTForCausalLM",
        {**_LLAMA, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1},
    ),
    _decoder("gemma", "GemmaConfig", "GemmaForCausalLM", _GEMMA),
    _decoder("gemma2", "Gemma2Config", "Gemma2ForCausalLM", _GEMMA),
    _decoder("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", {**_GEMMA, **_MIXED}),
    _decoder("phi", "PhiConfig", "PhiForCausalLM", _LLAMA),
    _decoder("phi3", "Phi3Config", "Phi3ForCausalLM", _LLAMA),
    _decoder("olmo2", "Olmo2Config", "Olmo2ForCausalLM", _LLAMA),
    _decoder("olmo", "OlmoConfig", "OlmoForCausalLM", _LLAMA),
    _decoder("arcee", "ArceeConfig", "ArceeForCausalLM", _LLAMA),
    _decoder("falcon", "FalconConfig", "FalconForCausalLM", _LLAMA),
    _decoder("bloom", "BloomConfig", "BloomForCausalLM", _BLOOM),
    _decoder("cohere2", "Cohere2Config", "Cohere2ForCausalLM", {**_LLAMA, **_MIXED}),
    _decoder("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM", {**_LLAMA, **_SMOLLM}),
    _decoder("starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM", _LLAMA),
    _decoder("granite", "GraniteConfig", "GraniteForCausalLM", _LLAMA),
    _decoder("glm", "GlmConfig", "GlmForCausalLM", _GEMMA),
    _decoder("cohere", "CohereConfig", "CohereForCausalLM", _LLAMA),
    _decoder("mixtral", "MixtralConfig", "MixtralForCausalLM", _LLAMA),
    _decoder(
        "gpt_oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_GEMMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    _encoder("bert", "BertConfig", "BertForSequenceClassification", _BERT),
    _encoder(
        "roberta",
        "RobertaConfig",
        "RobertaForSequenceClassification",
        {**_BERT, "pad_token_id": 1, "max_position_embeddings": 66},
    ),
    _encoder(
        "modernbert",
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        {**_BERT, "local_attention": 128, "cls_token_id": 1, "sep_token_id": 2},
    ),
    _encoder(
        "electra",
        "ElectraConfig",
        "ElectraForSequenceClassification",
        {**_BERT, "embedding_size": 16},
    ),
    _encoder(
        "distilbert",
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {
            "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "num_labels": LABELS,
            "max_position_embeddings": 64, "pad_token_id": 0,
        },
    ),
    Family(
        name="t5",
        config="T5Config",
        model="T5ForConditionalGeneration",
        kind="encoder-decoder",
        settings={
            "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
            "decoder_start_token_id": 0, "pad_token_id": 0,
        },
    ),
)  # fmt: skip
_BY_NAME = {family.name: family for family in FAMILIES}


# memory can be attached to these; others do not look their attention function up
ATTACHABLE = tuple(
    family
    for family in FAMILIES
    if family.kind == "decoder" and family.name not in ("falcon", "bloom")
)


@pytest.fixture(params=ATTACHABLE, ids=lambda family: family.name)
def attachable(request: pytest.FixtureRequest) -> Family:
    """Every family that memory can be attached to."""
    family: Family = request.param
    return family


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    """Every family of the table."""
    row: Family = request.param
    return row


@pytest.fixture(params=["gpt2", "llama", "bloom", "bert", "roberta", "t5"])
def few_families(request: pytest.FixtureRequest) -> Family:
    """One family for each way to give positions, of each kind."""
    return _BY_NAME[request.param]


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Build a tiny model of a family by its name."""
    return lambda name, **changes: _BY_NAME[name].build(**changes)


@pytest.fixture
def wrap() -> Callable[..., RecurrentMemory]:
    """Put a small recurrent memory, of vectors as large as token embeddings, around a model."""

    def make(model: PreTrainedModel, **changes: Any) -> RecurrentMemory:
        settings = {"segment_length": 7, "num_memory_tokens": 3, **changes}
        torch.manual_seed(3)
        return RecurrentMemory(model, RecurrentMemoryConfig(**settings)).eval()

    return make


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """Draw token ids that no family takes for padding."""

    def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCAB, (batch, length), generator=generator)

    return tokens

"""Runs whose steps are compiled, and the same runs without, in a process without the tests' checks.

Those checks wrap every function with annotations, which compilers cannot see through.
"""

import functools
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from training_setup import (
    VOCAB,
    losses,
    make_dataset,
    make_trainer,
    metrics_of,
    training_config,
)
from transformers import LlamaConfig, LlamaForCausalLM

from byheart import KnnMemoryConfig, attach
from byheart.models.checkpoint import load_model
from byheart.training.arguments import training_arguments
from byheart.training.checkpoint import find_checkpoint
from byheart.training.trainer import MemoryTrainer

CONFIG = training_config(max_steps=9, save_every=4, accumulation_steps=2)
_COMPILE = torch.compile


@functools.cache
def compile_for_tests(function, *, mode, **options):
    """Compile in seconds, where the real backend takes minutes, and a resumed run not again."""
    assert mode == "default"
    return _COMPILE(function, backend="aot_eager", **options)


def weights(out):
    return load_model(out / "checkpoint-9" / "model").state_dict()


def compare_pretrained(folder):
    """Train a Hugging Face model with memory, compiled and not."""
    widths = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    shape = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=64, intermediate_size=24, num_key_value_heads=2,
        **widths,
    )  # fmt: skip
    knn = KnnMemoryConfig(layers=(1,), memory_size=17, top_k=5)
    for name, config in (("eager", CONFIG), ("compiled", replace(CONFIG, compile="default"))):
        torch.manual_seed(0)
        model = attach(
            LlamaForCausalLM(shape), knn=knn, segment_length=7, xl_cache_length=7, gate_init=0.5
        )
        out = folder / name
        arguments = training_arguments(config, out)
        MemoryTrainer(model, make_dataset(config), config, arguments, identity={}).train()
    torch.testing.assert_close(
        torch.tensor(losses(folder / "compiled")), torch.tensor(losses(folder / "eager"))
    )


def compare_decoder(folder):
    """Train a decoder, compiled and not, and resume it."""
    make_trainer(folder / "eager", CONFIG).train()
    compiled = replace(CONFIG, compile="default")
    make_trainer(folder / "whole", compiled).train()
    torch.testing.assert_close(
        torch.tensor(losses(folder / "whole")), torch.tensor(losses(folder / "eager"))
    )
    assert weights(folder / "whole").keys() == weights(folder / "eager").keys()
    # a resumed run is the same, and so is one that was not compiled until then, but for rounding
    for name, config in (("resumed", compiled), ("changed", CONFIG)):
        shutil.copytree(folder / "whole", folder / name)
        shutil.rmtree(folder / name / "checkpoint-9")
        make_trainer(folder / name, config).train(find_checkpoint(folder / name))
    assert metrics_of(folder / "resumed") == metrics_of(folder / "whole")
    for mine, theirs in zip(
        weights(folder / "resumed").values(), weights(folder / "whole").values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(
        torch.tensor(losses(folder / "changed")), torch.tensor(losses(folder / "whole"))
    )


def main() -> None:
    torch.compile = compile_for_tests
    for compare in (compare_decoder, compare_pretrained):
        counters.clear()
        compare(Path(sys.argv[1]) / compare.__name__)
        assert not counters["graph_break"], counters["graph_break"]
        assert counters["stats"]["unique_graphs"] > 0


if __name__ == "__main__":
    main()

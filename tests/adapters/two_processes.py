"""One process of two, started by torchrun: gradients of its half of the batch, and their mean."""

import argparse
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from byheart.adapters.recurrent import RecurrentMemory
from byheart.models.recurrent_config import RecurrentMemoryConfig


def make_model(settings):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=43, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    )
    config = RecurrentMemoryConfig(segment_length=7, num_memory_tokens=3, **settings)
    return RecurrentMemory(model, config)


def batch_of(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 43, (2, 19), generator=generator)


def gradients(memory_model, rank, called=None):
    torch.manual_seed(100 + rank)
    ids = batch_of(rank)
    (called or memory_model)(ids, labels=ids).loss.backward()
    return {name: weight.grad.clone() for name, weight in memory_model.named_parameters()}


def main() -> None:
    warnings.simplefilter("error")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", type=json.loads)
    arguments = parser.parse_args()
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    memory_model = make_model(arguments.settings)
    mine = gradients(memory_model, rank, DistributedDataParallel(memory_model))
    save_file(mine, arguments.folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""Two processes: gradients of their halves of a batch, and the mean of them.

They are forks of one that has imported everything, which takes longer than all that they do.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.multiprocessing import start_processes
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


def run(rank, folder, cases):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for index, settings in enumerate(cases):
        memory_model = make_model(settings)
        mine = gradients(memory_model, rank, DistributedDataParallel(memory_model))
        save_file(mine, folder / f"{index}-{rank}.safetensors")
    distributed.destroy_process_group()


def main() -> None:
    warnings.simplefilter("error")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", type=json.loads)
    arguments = parser.parse_args()
    start_processes(run, (arguments.folder, arguments.cases), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()

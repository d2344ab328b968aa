"""Two processes, in each of which a model with memory learns its own documents.

They are forks of one that has imported everything, which takes longer than all that they do.
"""

import argparse
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from byheart import KnnMemoryConfig, attach

STEPS, SEGMENT = 4, 7


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=43, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    knn = KnnMemoryConfig(layers=(1,), memory_size=17, top_k=5)
    return attach(LlamaForCausalLM(config), knn=knn, segment_length=SEGMENT, gate_init=0.3)


def segments_of(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 43, (2, STEPS * SEGMENT), generator=generator).split(SEGMENT, 1)


def run(rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    memory_model = make_model()
    # the gate takes part in the first step, too, when the memory is empty
    parallel = DistributedDataParallel(memory_model)
    optimizer = torch.optim.SGD(memory_model.parameters(), lr=0.1)
    state = memory_model.new_state(2)
    for segment in segments_of(rank):
        out = parallel(segment, labels=segment, state=state)
        out.loss.backward()
        state = state.commit(out.new_entries)
        optimizer.step()
        optimizer.zero_grad()
    weights = {f"weight.{name}": weight for name, weight in memory_model.named_parameters()}
    store = state.stores[1].state_dict()
    save_file({**weights, **store}, folder / f"{rank}.safetensors")
    # a process that ends while the reducer still holds the group can wait for the other for ever
    distributed.barrier()
    del parallel
    distributed.destroy_process_group()


def main() -> None:
    warnings.simplefilter("error")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    start_processes(run, (folder,), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()

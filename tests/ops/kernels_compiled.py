"""Compile the kernels for GPUs that are not there, as the launchers ask for it.

In a process of its own: the tests run kernels in Triton's interpreter, which is a choice per
process. Nothing is launched. What a program needs of shared memory must fit into the device.
"""

import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from byheart.ops import search_plan, search_triton
from byheart.ops.gather_triton import KernelGatherAttend

SHARED_BYTES = {86: 101_376, 90: 232_448, 100: 232_448}


class NoDriver:
    """What the compiler asks a driver for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # what is compiled for one is not used for another
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def pretend(capability):
    """Compile instead of launching, and refuse what the device would refuse."""
    limit = SHARED_BYTES[capability]
    properties = SimpleNamespace(shared_memory_per_block_optin=limit, major=capability // 10)
    torch.cuda.get_device_properties = lambda _: properties
    list_launches = search_plan.list_launches
    search_triton.list_launches = lambda _, *sizes: list_launches(torch.device("cuda"), *sizes)
    driver.set_active(NoDriver(capability))

    def compile_only(kernel, grid):
        def call(*arguments, **options):
            compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
            if compiled.metadata.shared > limit:
                raise triton.OutOfResources(compiled.metadata.shared, limit, "shared memory")

        return call

    jit.KernelInterface.__getitem__ = compile_only
    # no kernel fills what it would return
    torch.empty = torch.zeros


def search(queries, keys, head_dim, top_k, *, entries=4096, biased=False):
    plan = search_plan.default_plan(entries, top_k, head_dim * keys.itemsize)
    search_triton.search(
        torch.zeros(1, 1, 130, head_dim, dtype=queries),
        torch.zeros(1, 1, entries, head_dim).to(keys),
        torch.ones(1, entries, dtype=torch.bool),
        torch.zeros(1, entries) if biased else None,
        top_k,
        1 << 20,
        plan,
    )


def attend(queries, stored, head_dim, top_k, *, biased=False):
    shape = (1, 2, 3, top_k)
    scores, slots = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    memory = torch.zeros(1, 1, 64, head_dim).to(stored)
    output, logsumexp = KernelGatherAttend.apply(
        torch.zeros(*shape[:3], head_dim, dtype=queries, requires_grad=True),
        torch.ones(2, requires_grad=True),
        memory,
        memory,
        scores,
        slots,
        torch.ones(shape, dtype=torch.bool),
        scores if biased else None,
        biased,
    )
    (output.float().sum() + logsumexp.sum()).backward()


def compile_for(capability):
    pretend(capability)
    search(torch.float32, torch.bfloat16, 64, 32, biased=True)
    search(torch.bfloat16, torch.bfloat16, 128, 8)
    search(torch.float32, torch.float32, 64, 32)
    search(torch.float32, torch.float32, 256, 8)
    attend(torch.float32, torch.bfloat16, 64, 32)
    attend(torch.bfloat16, torch.float32, 80, 7, biased=True)
    if capability >= 89:
        search(torch.float32, torch.float8_e4m3fn, 64, 32)
        attend(torch.float32, torch.float8_e4m3fn, 64, 32)


def main() -> None:
    for capability in sys.argv[1:]:
        sys.stderr.write(f"{capability}:\n")
        compile_for(int(capability))


if __name__ == "__main__":
    main()

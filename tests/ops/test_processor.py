"""What a processor is made for."""

import pytest
import torch

from byheart.ops.processor import multiplies_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": False, "avx512_vnni": True, "avx2": True}, False),
        ({}, False),
    ],
)
def test_a_cpu_multiplies_bfloat16_with_an_instruction_alone(capabilities, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bfloat16(CPU) == fast
    assert multiplies_bfloat16(torch.device("cuda", 0))


def test_a_cpu_of_which_torch_says_nothing_does_not(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_bfloat16(CPU)

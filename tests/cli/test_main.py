"""Failures that are none of byheart's own errors: one clear line, or a traceback."""

import pytest
import torch

TOO_LITTLE = "There must be enough memory for what was asked for, got: "
LOWER = "Lower --memory-size, the number of rows or the length of a segment."


def raising(error):
    def fail(*arguments):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes.\n#0"),
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes. ",
        ),
        (torch.OutOfMemoryError("Tried to allocate 9 GiB.\nFrames"), "Tried to allocate 9 GiB. "),
        (RuntimeError("CUDA error: out of memory\nCompile with"), "CUDA error: out of memory. "),
        (TypeError('zeros(): "Overflow when unpacking long\nException'), 'zeros(): "Overflow '),
        (MemoryError(), "MemoryError. "),
    ],
)
def test_too_little_memory_is_one_clear_line(command, monkeypatch, error, line):
    monkeypatch.setattr("byheart.cli.generate.open_run", raising(error))
    code, out, err = command("generate", "x", "--prompt", "x")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {TOO_LITTLE}{line}")
    assert err.endswith(LOWER)


def test_other_errors_of_torch_keep_their_traceback(command, monkeypatch):
    monkeypatch.setattr("byheart.cli.generate.open_run", raising(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        command("generate", "x", "--prompt", "x")


@pytest.mark.parametrize("size", ["100000000M", "100000000000M", f"1{'0' * 25}"])
def test_a_memory_that_no_machine_has_is_one_clear_line(command, run_dir, size):
    code, _, err = command("generate", run_dir, "--prompt", "x", "--memory-size", size)
    assert code == 1
    assert err.startswith(f"error: {TOO_LITTLE}")
    assert err.endswith(LOWER)


def test_numbers_that_are_too_large_are_one_clear_line(command, documents):
    for arguments in (
        ["flops", "--tokens", f"1{'0' * 160}"],
        ["data", "stats", documents, "--segment-length", "9" * 24],
    ):
        code, out, err = command(*arguments)
        assert code == 1, arguments
        assert err.startswith("error: Numbers must be small enough to compute with, got: ")
        assert "Lower those that were given." in err
        assert not out

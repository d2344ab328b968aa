"""Runs whose steps are compiled, and runs that cannot be."""

import subprocess
import sys
from pathlib import Path

import pytest
from training_setup import make_trainer, training_config

from byheart.memory.config import KnnMemoryConfig
from byheart.training.compiled import compiled, keep_addresses

SCRIPT = Path(__file__).parent / "compiled_training.py"


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


def test_a_store_that_is_not_made_of_tensors_is_not_compiled(tmp_path):
    knn = KnnMemoryConfig(layers=(1,), memory_size=23, top_k=4, store="faiss")
    with pytest.raises(ValueError, match=r"compile='default' needs a memory with store='dense'"):
        make_trainer(tmp_path, training_config(compile="default"), model={"knn_memory": knn})


def test_accumulated_gradients_are_kept_out_of_cuda_graphs():
    with pytest.raises(ValueError, match=r"must have accumulation_steps=1, got 2: a CUDA graph"):
        training_config(compile="reduce-overhead", accumulation_steps=2)
    assert training_config(compile="default", accumulation_steps=2).compile == "default"


def test_without_compilation_a_function_is_itself():
    assert compiled(len, "no") is len


def test_cuda_graphs_are_promised_that_rings_stay_in_place(tmp_path):
    trainer = make_trainer(tmp_path, training_config())
    for mode, is_promised in (("default", False), ("reduce-overhead", True)):
        states = [trainer.trained.new_state(2)]
        keep_addresses(states, mode)
        rings = [side for store in states[0].stores.values() for side in (store.keys, store.values)]
        assert rings
        assert all(hasattr(ring, "_dynamo_static_input_type") == is_promised for ring in rings)

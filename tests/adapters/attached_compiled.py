"""A model with memory, compiled and not, in a process without the checks of the tests.

Those checks wrap every function with annotations, which compilers cannot see through.
"""

import sys
from pathlib import Path

import torch
import transformers

from byheart import KnnMemoryConfig, attach
from byheart.ops import gather_triton, search_plan, triton_door

SEGMENT = 7
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}


def make(family, layers, cache):
    torch.manual_seed(0)
    config, model = (getattr(transformers, name) for name in FAMILIES[family])
    widths = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 4}
    if family != "gpt2":
        widths |= {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
    knn = KnnMemoryConfig(layers=(layers - 1,), memory_size=17, top_k=5, age_slope=0.5)
    return attach(
        model(config(vocab_size=43, max_position_embeddings=64, **widths)).eval(),
        knn=knn, segment_length=SEGMENT, xl_cache_length=cache, gate_init=0.5,
    )  # fmt: skip


def learn(memory_model):
    ids = torch.randint(0, 43, (2, 4 * SEGMENT), generator=torch.Generator().manual_seed(1))
    state, logits = memory_model.new_state(2), []
    for segment in ids.split(SEGMENT, dim=1):
        out = memory_model(segment, labels=segment, state=state)
        out.loss.backward()
        state = state.commit(out.new_entries)
        logits.append(out.logits.detach())
    return [torch.cat(logits, 1), *(weight.grad for weight in memory_model.parameters())]


def use_kernels():
    """Search and attend by kernels from now on, whatever the device and whether they work on it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
    from interpreted import interpret_fast

    interpret_fast()

    def uses_kernels(tensor, stored):
        return triton_door._works(tensor.device.index or 0, stored) or True

    for module in (gather_triton, search_plan):
        module.uses_kernels = uses_kernels
    search_plan.choose_plan = lambda *_: search_plan.Plan(8, 8)


def compare(family, layers, cache, *options):
    expected = learn(make(family, layers, cache))
    if options == ("kernels",):
        use_kernels()
    memory_model = make(family, layers, cache)
    model = memory_model.model
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(learn(memory_model), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def main() -> None:
    for case in sys.argv[1:]:
        sys.stderr.write(f"{case}:\n")
        family, layers, cache, *options = case.split(",")
        # nothing compiled before is used again
        torch.compiler.reset()
        compare(family, int(layers), int(cache), *options)


if __name__ == "__main__":
    main()

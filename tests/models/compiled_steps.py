"""Whole steps, compiled and not, in a process without the checks of the tests.

Those checks wrap every function with annotations, which compilers cannot see through.
"""

import sys
import traceback
from dataclasses import replace
from functools import partial

import pytest
import torch
from step_setup import SEGMENT, assert_same, assert_same_state, batches, make_config
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from byheart.memory.state import MemoryState
from byheart.testing.tiny import random_tokens, tiny_config, tiny_decoder

ROUNDS = 2


def compiled(function, backend):
    """Compile without a break and for fixed shapes."""
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def never_again():
    """Refuse to compile anything from now on."""
    torch.compiler.set_stance("fail_on_recompile")


class Step(torch.nn.Module):
    """Forward, and whatever comes before it."""

    def __init__(self, decoder, kind):
        super().__init__()
        self.decoder, self.kind = decoder, kind

    def forward(self, state, batch):
        if self.kind == "known":
            state = state.at_segment_start(batch["document_start"])
        return self.decoder(**batch, state=state), state


def one_layer(config):
    """Leave the layer with the memory, which takes half as long to compile."""
    return replace(config, num_layers=1, knn_memory=replace(config.knn_memory, layers=(0,)))


def train(decoder, forward, commit, kind, *, settled):
    """Return losses, gradients and the last state; after `settled` steps nothing is compiled."""
    state, losses = decoder.new_state(2), []
    for step, segment in enumerate(list(batches()) * ROUNDS):
        if step == settled:
            never_again()
        batch = segment
        if kind == "whole":
            batch = {**segment, "num_tokens": None, "targets": segment["targets"].clamp(min=0)}
        out, state = forward(state, batch)
        out.loss.backward()
        state = commit(state, out.new_entries)
        losses.append(out.token_losses.detach())
    torch.compiler.set_stance("default")
    return torch.stack(losses), [weight.grad for weight in decoder.parameters()], state


def check_training(kind, name, cache, *, backend):
    """Compare compiled training with training.

    Args:
        kind: Whether rows read `whole` segments, or segments and ends of documents, of which it is
            `known` or `unknown` that each begins a segment.
        name: Of a config.
        cache: Length of the XL cache.
        backend: Of the compiler.
    """
    config = make_config(name, xl_cache_length=cache)
    # with the other kinds the memory alone
    config = config if kind == "known" else one_layer(config)
    eager = tiny_decoder(config)
    expected = train(eager, Step(eager, kind), MemoryState.commit, kind, settled=None)
    decoder = tiny_decoder(config)
    forward, commit = (
        compiled(part, backend) for part in (Step(decoder, kind), MemoryState.commit)
    )
    # what is pending is allocated in the first step
    found = train(decoder, forward, commit, kind, settled=1 if kind == "whole" else 2)
    assert_same(found, expected)
    assert (found[2].pending is None) == (kind == "whole")


def decode(decoder, tokens, step, *, settled):
    """Return the scores after every token and the last state."""
    state, scores = decoder.new_state(len(tokens)), []
    for index, column in enumerate(tokens.split(1, dim=1)):
        if index == settled:
            never_again()
        with torch.no_grad():
            logits, state = step(decoder, column, state)
        scores.append(logits.clone())
    torch.compiler.set_stance("default")
    return torch.cat(scores, dim=1), state


def decode_one(decoder, column, state):
    """Read a token per row, and what it adds into the state."""
    out = decoder(column, state=state)
    return out.logits, state.commit(out.new_entries)


def once_pending(compiled_step, step):
    """Compile for states in which something is pending, not also for the first, which has none."""

    def either(decoder, column, state):
        chosen = step if state.pending is None else compiled_step
        return chosen(decoder, column, state)

    return either


def check_decoding(name, cache, *, backend):
    decoder = tiny_decoder(one_layer(make_config(name, xl_cache_length=cache)))
    tokens = random_tokens(2, 4 * SEGMENT + 3)
    expected, before = decode(decoder, tokens, decode_one, settled=None)
    step = compiled(decode_one, backend)
    step = step if name == "gate" else once_pending(step, decode_one)
    found, after = decode(decoder, tokens, step, settled=2)
    torch.testing.assert_close(found, expected)
    assert_same_state(after, before)


def check_protection():
    """A compiled step refuses what a step refuses."""
    decoder, tokens = tiny_decoder(one_layer(tiny_config())), random_tokens(2, SEGMENT)
    forward, commit = compiled(decoder, "aot_eager"), compiled(MemoryState.commit, "aot_eager")
    right = {"num_tokens": torch.tensor([SEGMENT, SEGMENT]), "targets": tokens}
    old = decoder.new_state(2)
    out = forward(tokens, state=old, **right)
    new = commit(old, out.new_entries)
    for use in (lambda: forward(tokens, state=old, **right), lambda: commit(old, out.new_entries)):
        with pytest.raises(RuntimeError) as caught:
            use()
        assert "fork() before commit" in describe(caught.value)
    # what was refused has changed nothing
    assert forward(tokens, state=new, **right).loss.isfinite()
    for wrong, message in (
        ({"num_tokens": torch.tensor([8, 7])}, "num_tokens must be between 0 and"),
        ({"targets": torch.full((2, SEGMENT), 31)}, "labels must be in the vocabulary"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(tokens, state=new, **{**right, **wrong})


def check_writes_in_place():
    """A compiled commit allocates nothing as large as a ring: it writes into the ring itself."""
    decoder = tiny_decoder(tiny_config(memory_size=1009))
    state = decoder.new_state(2)
    out = decoder(random_tokens(2, SEGMENT), state=state)
    ring, expected = state.stores[1].keys, state.fork().commit(out.new_entries)
    commit = compiled(MemoryState.commit, "inductor")
    # finding out which vectors the compiler knows takes longer than compiling without them
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        after, code = run_and_get_code(commit, state, out.new_entries)
    assert after.stores[1].keys is ring
    assert_same_state(after, expected)
    allocations = [line for line in "\n".join(code).splitlines() if "empty_strided" in line]
    assert allocations
    assert not any("1009" in line for line in allocations), allocations


def describe(error):
    """Return what an error and its causes say."""
    said = str(error)
    while (error := error.__cause__ or error.__context__) is not None:
        said += "\n" + str(error)
    return said


CHECKS = {"protection": check_protection, "in place": check_writes_in_place}


def check(case):
    """Run a check by name, or a comparison: `kind,name,cache`."""
    # nothing compiled before is used again
    torch.compiler.reset()
    if case in CHECKS:
        CHECKS[case]()
    else:
        kind, name, cache = case.split(",")
        compare = check_decoding if kind == "decode" else partial(check_training, kind)
        compare(name, int(cache), backend="aot_eager")
    assert not counters["graph_break"], counters["graph_break"]


def fails(case):
    """Whether a check fails, and print why."""
    try:
        check(case)
    except Exception:
        traceback.print_exc()
        return True
    return False


def main() -> None:
    """Run the checks that the command line names, and say last which failed."""
    if failed := [case for case in sys.argv[1:] if fails(case)]:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

"""Steps from CUDA graphs against steps without, in a process without the checks of the tests.

Those checks wrap every function with annotations, which compilers cannot see through.
"""

import sys

import torch
from torch._dynamo.utils import counters

from byheart.memory.config import KnnMemoryConfig
from byheart.memory.state import MemoryState
from byheart.models.config import preset
from byheart.models.decoder import Decoder

ROWS, SEGMENT, VOCAB, STEPS = 3, 32, 97, 8


def make():
    """Return a decoder and its state, which graphs are promised to find where it is."""
    torch.manual_seed(0)
    knn = KnnMemoryConfig(layers=(1,), memory_size=100, top_k=8)
    config = preset("tiny", VOCAB, segment_length=SEGMENT, xl_cache_length=SEGMENT, knn_memory=knn)
    decoder = Decoder(config).cuda()
    state = decoder.new_state(ROWS)
    for store in state.stores.values():
        for side in (store.keys, store.values):
            torch._dynamo.mark_static_address(side, guard=False)
    return decoder, state


def graphed(decoder):
    """Compile forward into CUDA graphs, and commit without."""
    return (
        torch.compile(decoder, mode="reduce-overhead", fullgraph=True, dynamic=False),
        torch.compile(MemoryState.commit, fullgraph=True, dynamic=False),
    )


def train(graphs):
    decoder, state = make()
    forward, commit = graphed(decoder) if graphs else (decoder, MemoryState.commit)
    tokens = torch.randint(VOCAB, (ROWS, STEPS * SEGMENT + 1)).cuda()
    results = []
    for start in range(0, STEPS * SEGMENT, SEGMENT):
        piece = tokens[:, start : start + SEGMENT + 1]
        torch.compiler.cudagraph_mark_step_begin()
        out = forward(piece[:, :-1], state=state, targets=piece[:, 1:])
        out.loss.backward()
        # the next step overwrites what a graph has returned, gradients included
        results.append(out.loss.detach().clone())
        results += [weight.grad.clone() for weight in decoder.parameters()]
        decoder.zero_grad()
        state = commit(state, out.new_entries)
    return results


@torch.no_grad()
def decode(graphs):
    decoder, state = make()
    forward, commit = graphed(decoder) if graphs else (decoder, MemoryState.commit)
    tokens = torch.randint(VOCAB, (ROWS, 3 * SEGMENT)).cuda()
    scores = []
    for column in tokens.split(1, dim=1):
        torch.compiler.cudagraph_mark_step_begin()
        out = forward(column, state=state)
        scores.append(out.logits.clone())
        state = commit(state, out.new_entries)
    return scores


def main():
    run = {"train": train, "decode": decode}[sys.argv[1]]
    expected = run(graphs=False)
    torch.testing.assert_close(run(graphs=True), expected, atol=2e-3, rtol=1e-2)
    assert not counters["graph_break"], counters["graph_break"]
    skipped = counters["inductor"]["cudagraph_skips"]
    assert not skipped, f"{skipped} graphs were not captured"


if __name__ == "__main__":
    main()

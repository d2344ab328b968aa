"""Arguments that do not fit together are refused before anything is read."""

import subprocess
import sys

import pytest
import torch

from byheart.models.arguments import require_arguments, require_state_type

IDS = torch.zeros(3, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a tensor of integers, got list"),
        ({"input_ids": IDS.float()}, TypeError, "tensor of integers, got torch.float32"),
        ({"input_ids": IDS[0]}, ValueError, r"\[batch, tokens\] .* got shape \[5\]. Use input_ids"),
        ({"input_ids": IDS[:, :0]}, ValueError, r"at least one token, got shape \[3, 0\]"),
        ({"input_ids": IDS + 9}, ValueError, "input_ids must be between 0 and 8, got 9"),
        ({"input_ids": IDS - 1}, ValueError, "input_ids must be between 0 and 8, got -1"),
        (
            {"document_start": torch.ones(1).bool()},
            ValueError,
            r"document_start must have an entry for each row, \[3\], got shape \[1\]",
        ),
        ({"document_start": torch.ones(3).long()}, TypeError, "of booleans, got torch.int64"),
        ({"document_start": [True] * 3}, TypeError, "tensor of booleans, got list"),
        ({"num_tokens": torch.ones(2).long()}, ValueError, r"num_tokens .* \[3\], got shape \[2\]"),
        ({"num_tokens": torch.ones(3)}, TypeError, "num_tokens must be a tensor of integers"),
        ({"targets": IDS[:1]}, ValueError, r"shape of input_ids, \[3, 5\], got shape \[1, 5\]"),
        ({"labels": IDS[:, 1:]}, ValueError, r"labels .* \[3, 5\], got shape \[3, 4\]"),
        ({"labels": IDS.bool()}, TypeError, "labels must be a tensor of integers, got torch.bool"),
        ({"labels": IDS + 7}, ValueError, "labels must be between 0 and 6, or -100 for none, got"),
        ({"targets": IDS - 5}, ValueError, "targets must be between 0 and 6, or -100 .* got -5"),
    ],
)
def test_each_is_named(arguments, error, message):
    given = {"input_ids": IDS, **arguments}
    with pytest.raises(error, match=message):
        require_arguments(given.pop("input_ids"), 9, 7, **given)


def test_what_fits_is_taken():
    require_arguments(
        IDS, 9, document_start=torch.zeros(3).bool(), num_tokens=None, targets=IDS - 100
    )


def test_a_state_must_be_a_state():
    with pytest.raises(TypeError, match=r"state must be a dict, got Tensor\. Make one with"):
        require_state_type(IDS, dict)


# the checks of shapes that these tests bring would answer first
_MODELS = """
import torch, transformers, byheart
from byheart.testing.tiny import tiny_decoder

llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=64,
))
knn = byheart.KnnMemoryConfig(layers=(1,), memory_size=17, top_k=5)
ids = torch.zeros(3, 5, dtype=torch.long)

def check(call, expected):
    try:
        call()
    except (ValueError, TypeError) as error:
        assert expected in str(error), (expected, str(error))
    else:
        raise AssertionError(expected)

check(lambda: byheart.attach(llama, knn={"layers": (1,)}), "knn must be a KnnMemoryConfig or")
check(lambda: byheart.attach(llama, knn=knn, segment_length=7.5), "number of at least 1, got 7.5")
recurrent = byheart.RecurrentMemory(llama, byheart.RecurrentMemoryConfig(segment_length=7))
for labels in ("labels", "targets"):
    check(lambda: recurrent(ids, **{labels: ids + 31}), labels + " must be between 0 and 30, or")
check(lambda: recurrent(ids, labels=[[1]]), "labels must be a tensor of integers, got list")
check(lambda: recurrent(ids, labels=ids.float()), "tensor of integers, got torch.float32")
check(lambda: recurrent([[1]]), "input_ids must be a tensor, got list")
check(lambda: recurrent(ids, state=ids), "state must be a RecurrentState, got Tensor")
check(lambda: recurrent(ids, document_start=ids[:, 0]), "must have one boolean per row, [3]")
decoder, attached = tiny_decoder(), byheart.attach(llama, knn=knn, segment_length=7)
for model in (decoder, attached):
    one = torch.ones(1, dtype=torch.bool)
    state = model.new_state(3)
    check(lambda: model(ids, document_start=one), "document_start must have an entry for each row")
    check(lambda: model(ids, targets=ids[:1]), "targets must have the shape of input_ids")
    check(lambda: model(ids, targets=ids + 999), "targets must be between 0 and")
    check(lambda: model(ids + 999), "input_ids must be between 0 and")
    check(lambda: model(ids, num_tokens=ids[:2, 0]), "num_tokens must have an entry for each row")
    check(lambda: model(ids, state=ids), "state must be a MemoryState, got Tensor")
    for bad in ({"document_start": one}, {"num_tokens": ids[:2, 0]}):
        check(lambda: byheart.read_tokens(model, ids, state, **bad), "an entry for each row, [3]")
    check(lambda: byheart.read_tokens(model, ids[0], state), "input_ids must be [batch, tokens]")
    state = byheart.read_tokens(model, ids[:, :0], state).state  # a stream may bring nothing
    state.require_current()
"""


def test_all_models_refuse_them():
    result = subprocess.run(
        [sys.executable, "-c", _MODELS], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]

"""Compare a memory layer with what the authors of the Memorizing Transformer computed.

A file `mt_layer_*.npz` holds inputs, parameters and outputs of one memory layer of the Memorizing
Transformers code (google-research/meliad, training mode, no dropout; window and XL cache are one
segment). With T segments, B rows, S tokens per segment, H heads of width D, width E, feed-forward
width F, M memory slots and k neighbours:

========================== ============= =========================================================
array                      shape         meaning
========================== ============= =========================================================
`dims`                     8             B, S, H, D, E, F, M, k
`x`, `y`                   T, B, S, E    inputs and outputs of the layer (residual stream)
`start_of_document`        T, B          rows that begin a document with a segment
`params/...`                             the parameters, see `_parameters`
========================== ============= =========================================================
"""

import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from byheart.errors import DataError
from byheart.memory.config import KnnMemoryConfig
from byheart.memory.state import MemoryState, NewEntries
from byheart.memory.store import KeyValues
from byheart.models.config import DecoderConfig
from byheart.models.decoder import Block
from byheart.models.local import LocalContext

_NUM_T5_BUCKETS = 32
_POSITION_BIAS = "params/relative_positions/rel_embedding"


class Dims(NamedTuple):
    """The array `dims`."""

    batch: int
    segment_length: int
    num_heads: int
    head_dim: int
    embed_dim: int
    hidden_dim: int
    memory_size: int
    top_k: int


def layer_difference(path: str | PathLike[str]) -> float:
    """Run a recorded memory layer with byheart's code.

    Args:
        path: A file laid out as this module describes, of any dimensions.

    Returns:
        The largest absolute difference between the outputs, over all segments.

    Raises:
        DataError: If the file cannot be read, or an array is missing, unknown or has another shape.
    """
    arrays = _read_arrays(Path(path))
    dims = _read_dims(arrays, path)
    _check_arrays(arrays, dims, path)
    config = _config(dims, with_bias=_POSITION_BIAS in arrays, path=path)
    block = Block(config, 0).eval()
    block.load_state_dict(_parameters(arrays))
    outputs = _run_block(
        block, config, _tensor(arrays["x"]), torch.from_numpy(arrays["start_of_document"])
    )
    return (outputs - _tensor(arrays["y"])).abs().max().item()


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    if not path.exists():
        msg = f"{path} does not exist. Name a recording: a directory, or a file mt_layer_*.npz."
        raise DataError(msg)
    if path.is_file() and not zipfile.is_zipfile(path):
        msg = f"{path} must be an .npz file of named arrays. Name a recording mt_layer_*.npz."
        raise DataError(msg)
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        msg = f"{path} cannot be read: {error}. Name a recording mt_layer_*.npz."
        raise DataError(msg) from error


def _read_dims(arrays: Mapping[str, npt.NDArray[np.generic]], path: str | PathLike[str]) -> Dims:
    if "dims" not in arrays:
        msg = f"{path} lacks the array dims. Is it a recording of a memory layer?"
        raise DataError(msg)
    values = arrays["dims"].ravel().tolist()
    if len(values) != len(Dims._fields) or not all(
        isinstance(value, int) and value >= 1 for value in values
    ):
        msg = (
            f"dims in {path} must be the eight whole numbers B, S, H, D, E, F, M, k, got {values}."
        )
        raise DataError(msg)
    return Dims(*values)


def _parameter_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    heads, embed, hidden = dims.num_heads, dims.embed_dim, dims.hidden_dim
    width = heads * dims.head_dim
    return {
        "params/external_memory_bias": (heads,),
        _POSITION_BIAS: (heads, _NUM_T5_BUCKETS),
        "params/tbase/_kvq/attention_scale": (heads,),
        "params/tbase/_kvq/pre_attn_layernorm/scale": (embed,),
        "params/tbase/_kvq/queries_layer/kernel": (embed, width),
        "params/tbase/_kvq/keys_layer/kernel": (embed, width),
        "params/tbase/_kvq/values_layer/kernel": (embed, width),
        "params/tbase/post_attn_mlp/output_layer/kernel": (width, embed),
        "params/tbase/pre_ffn_layernorm/scale": (embed,),
        "params/tbase/ffn/hidden0/kernel": (embed, hidden),
        "params/tbase/ffn/output_layer/kernel": (hidden, embed),
    }


def _check_arrays(
    arrays: Mapping[str, npt.NDArray[np.generic]], dims: Dims, path: str | PathLike[str]
) -> None:
    """Require the arrays of the layout, with their shapes, and no unknown parameter.

    Raises:
        DataError: If one is missing, unknown, or has another shape or type.
    """
    num_segments = max(1, len(arrays["x"])) if "x" in arrays and arrays["x"].ndim else 1
    stream = (num_segments, dims.batch, dims.segment_length, dims.embed_dim)
    expected = {
        "x": stream,
        "y": stream,
        "start_of_document": stream[:2],
        **_parameter_shapes(dims),
    }
    for name, shape in expected.items():
        if name not in arrays:
            if name == _POSITION_BIAS:
                continue
            msg = f"{path} lacks the array {name}. Record it again."
            raise DataError(msg)
        if arrays[name].shape != shape:
            msg = (
                f"{name} in {path} must have the shape {list(shape)} that dims says, got "
                f"{list(arrays[name].shape)}. Record it again."
            )
            raise DataError(msg)
        kind = "b" if name == "start_of_document" else "f"
        if arrays[name].dtype.kind != kind:
            what = "true or false" if kind == "b" else "floating-point numbers"
            msg = f"{name} in {path} must be {what}, got {arrays[name].dtype}. Record it again."
            raise DataError(msg)
    unknown = [name for name in arrays if name.startswith("params/") and name not in expected]
    if unknown:
        msg = f"{path} has the parameter {unknown[0]}, which the layer does not have."
        raise DataError(msg)


def _config(dims: Dims, *, with_bias: bool, path: str | PathLike[str]) -> DecoderConfig:
    """Describe the authors' layer.

    Returns:
        A decoder of that one layer, with every quirk of the authors switched on.

    Raises:
        DataError: If the memory cannot be cut into k buckets.
    """
    length = dims.segment_length
    try:
        memory = KnnMemoryConfig(
            layers=(0,),
            memory_size=dims.memory_size,
            top_k=dims.top_k,
            search="strided_bucket",
            num_buckets=dims.top_k,
        )
    except ValueError as error:
        msg = f"dims in {path} must describe a memory of k strided buckets: {error}"
        raise DataError(msg) from error
    return DecoderConfig(
        vocab_size=1,
        num_layers=1,
        embed_dim=dims.embed_dim,
        num_heads=dims.num_heads,
        head_dim=dims.head_dim,
        hidden_dim=dims.hidden_dim,
        segment_length=length,
        xl_cache_length=length,
        window_length=length,
        position_bias="t5" if with_bias else "none",
        empty_slots="zeros",
        knn_memory=memory,
    )


def _parameters(arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Tensor]:
    """Give the authors' parameters byheart's names.

    Returns:
        The state of a `Block`.
    """

    def parameter(name: str) -> Tensor:
        return _tensor(arrays[f"params/{name}"])

    def weight(name: str) -> Tensor:
        # flax multiplies from the right, torch from the left
        return parameter(f"{name}/kernel").T

    state = {
        "attention_norm.weight": parameter("tbase/_kvq/pre_attn_layernorm/scale"),
        "attention.queries.weight": weight("tbase/_kvq/queries_layer"),
        "attention.keys.weight": weight("tbase/_kvq/keys_layer"),
        "attention.values.weight": weight("tbase/_kvq/values_layer"),
        "attention.output.weight": weight("tbase/post_attn_mlp/output_layer"),
        # the authors take the absolute value where the scale is used
        "attention.log_scale": parameter("tbase/_kvq/attention_scale").abs().log(),
        "attention.mix.gate_bias": parameter("external_memory_bias"),
        "feed_forward_norm.weight": parameter("tbase/pre_ffn_layernorm/scale"),
        "expand.weight": weight("tbase/ffn/hidden0"),
        "contract.weight": weight("tbase/ffn/output_layer"),
    }
    if _POSITION_BIAS in arrays:
        state["attention.position_bias"] = _tensor(arrays[_POSITION_BIAS])
    return state


@torch.no_grad()
def _run_block(block: Block, config: DecoderConfig, x: Tensor, starts: Tensor) -> Tensor:
    """Read the segments one after the other, committing each.

    Returns:
        The outputs, stacked.
    """
    length = config.segment_length
    state = MemoryState.empty(config.memory_layout, x.shape[1])
    num_tokens = torch.full((x.shape[1],), length)
    outputs = []
    for hidden, start in zip(x, starts, strict=True):
        state = state.start_documents(start)
        local = LocalContext.of(state, length, config.window, self_visible=config.self_visible)
        output, new = block(hidden, local, state.stores[0])
        outputs.append(output)
        entries = NewEntries(
            layers=(KeyValues(new.keys, new.values),),
            num_tokens=num_tokens,
            document_start=start,
            position=state.position,
        )
        state = state.commit(entries)
    return torch.stack(outputs)


def _tensor(array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).float()

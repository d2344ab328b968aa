"""Inverted-file indexes over runs of slots. The only importer of faiss."""

import warnings
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from byheart.ops.search_select import EXCLUDED

# lists of 128 entries, of which a quarter is read: see the measurements at `FaissStore`
_ENTRIES_PER_LIST = 128
_PROBED_SHARE = 4
# k-means does not get better lists from more than this
_TRAINING_POINTS_PER_LIST = 64
_TRAINING_ROUNDS = 8

# in units of top_k
_FETCHED_WITH_BIAS = 4


def import_faiss() -> ModuleType:
    """Import faiss, or say how to get it.

    Returns:
        The package.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # its generated bindings lack a __module__, which newer Pythons report on import
            warnings.simplefilter("ignore", DeprecationWarning)
            import faiss
    except ImportError as error:
        msg = (
            "store='faiss' needs the faiss package: pip install 'byheart[faiss]'. "
            "For exact search without it use store='dense'."
        )
        raise ImportError(msg) from error
    module: ModuleType = faiss
    return module


def build_index(keys: Float[Tensor, "entry head_dim"]) -> Any:
    """Index the keys of one head.

    Args:
        keys: Keys of any floating type.

    Returns:
        A faiss index.
    """
    faiss = import_faiss()
    num_entries, head_dim = keys.shape
    num_lists = max(1, num_entries // _ENTRIES_PER_LIST)
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(head_dim), head_dim, num_lists, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter = _TRAINING_ROUNDS
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _TRAINING_POINTS_PER_LIST
    vectors = keys.float().contiguous().numpy()
    index.train(vectors)
    index.add(vectors)
    return index


def search_index(
    indexes: tuple[Any, ...],
    start: int,
    queries: Float[Tensor, "heads query head_dim"],
    top_k: int,
    bias_N: Float[Tensor, " entry"] | None,
) -> tuple[Tensor, Tensor]:
    """Search the same run of slots of all heads of a row.

    An index does not know of a bias: with one, the best are chosen from 4 times as many.

    Args:
        indexes: One per key-value head.
        start: First slot of the run.
        queries: Queries in float32, in groups that share a key-value head.
        top_k: Entries wanted.
        bias_N: Added to the scores of the entry in each slot of the row.

    Returns:
        Scores and slots `[heads, query, k]`; what was not found has the lowest score.
    """
    faiss = import_faiss()
    index = indexes[0]
    if bias_N is not None:
        top_k = min(_FETCHED_WITH_BIAS * top_k, index.ntotal)
    # enough lists to hold top_k entries several times over
    enough = 4 * top_k * index.nlist // index.ntotal
    num_probes = min(index.nlist, max(1, index.nlist // _PROBED_SHARE, enough))
    parameters = faiss.SearchParametersIVF(nprobe=num_probes)
    queries_GQD = queries.reshape(len(indexes), -1, queries.shape[-1])
    scores, slots = [], []
    for head_index, head_queries in zip(indexes, queries_GQD.contiguous().numpy(), strict=True):
        found = head_index.search(head_queries, top_k, params=parameters)
        scores.append(torch.from_numpy(found[0]))
        slots.append(torch.from_numpy(found[1]))
    shape = (*queries.shape[:2], top_k)
    all_slots = torch.stack(slots).view(shape)
    missing, all_slots = all_slots < 0, all_slots.clamp_min(0) + start
    all_scores = torch.stack(scores).view(shape)
    if bias_N is not None:
        all_scores += bias_N[all_slots]
    return all_scores.masked_fill(missing, EXCLUDED), all_slots

"""How memory is written, kept and read: the attention of memory tokens, segment by segment."""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from byheart.adapters.attention_maps import segment_attention
from byheart.adapters.recurrent import RecurrentMemory
from byheart.data.tasks import TaskSample
from byheart.evaluation.plots import figure_axes
from byheart.ops.segments import segment_bounds

__all__ = ["Head", "MemoryAttention", "SegmentMap", "memory_attention", "plot_memory_attention"]


class Head(NamedTuple):
    """An attention head, both counted from 0."""

    layer: int
    """Its layer."""
    head: int
    """Its place in the layer."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SegmentMap:
    """Attention in one segment, of what stands before the text."""

    weights: Float[Tensor, "layers heads query key"]
    """Attention of the queries `query_labels` over the keys `key_labels`; each row sums to 1."""
    query_labels: tuple[str, ...]
    """Special tokens and memory."""
    key_labels: tuple[str, ...]
    """Everything in the window."""
    is_memory: Bool[Tensor, " key"]
    """Keys that are memory."""
    is_fact: Bool[Tensor, " key"]
    """Keys that belong to a fact."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MemoryAttention:
    """Attention of memory in a document."""

    segments: tuple[SegmentMap, ...]
    """One per segment."""

    def written(self) -> Float[Tensor, "layers heads"]:
        """Give how much each head writes facts: attention of memory to the facts.

        Returns:
            Mean over the memory tokens, in the segment with most of it.
        """
        means = []
        for segment in self.segments:
            places = segment.is_memory.nonzero().flatten()
            to_facts = segment.weights[:, :, places][..., segment.is_fact].sum(dim=-1)
            means.append(to_facts.mean(dim=-1))
        return torch.stack(means).amax(dim=0)

    def kept(self) -> Float[Tensor, "layers heads"]:
        """Give how much each head keeps: attention of each memory token to its own place.

        Returns:
            Mean over the memory tokens and segments.
        """
        means = []
        for segment in self.segments:
            places = segment.is_memory.nonzero().flatten()
            means.append(segment.weights[:, :, places, places].mean(dim=-1))
        return torch.stack(means).mean(dim=0)

    def read(self) -> Float[Tensor, "layers heads"]:
        """Give how much each head answers from memory: attention of the first token to memory.

        Returns:
            Sum over the memory, in the last segment.
        """
        last = self.segments[-1]
        return last.weights[:, :, 0, last.is_memory].sum(dim=-1)

    def telling_heads(self) -> dict[str, Head]:
        """Choose the heads that write, keep and read most.

        Returns:
            A head for each of `write`, `keep` and `read`.
        """
        scores = {"write": self.written(), "keep": self.kept(), "read": self.read()}
        num_heads = self.segments[0].weights.shape[1]
        return {
            name: Head(*divmod(int(score.argmax()), num_heads)) for name, score in scores.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Give what each head does, and the maps of the telling ones, for JSON.

        Returns:
            Nested dictionaries.
        """
        heads = self.telling_heads()
        return {
            "written": self.written().tolist(),
            "kept": self.kept().tolist(),
            "read": self.read().tolist(),
            "heads": {
                name: {
                    **head._asdict(),
                    "segments": [
                        segment.weights[head.layer, head.head].tolist() for segment in self.segments
                    ],
                }
                for name, head in heads.items()
            },
            "labels": [list(segment.key_labels) for segment in self.segments],
        }


def memory_attention(memory_model: RecurrentMemory, sample: TaskSample) -> MemoryAttention:
    """Read a document and look at the attention of memory and special tokens.

    Args:
        memory_model: An encoder with memory.
        sample: The document, short enough to be held as a whole.

    Returns:
        The attention in each segment.

    Source:
        Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT, "Attention
        Patterns of Memory Operations" (arXiv:2304.11062).
    """
    config = memory_model.memory_config
    ids = sample.tokens(0, sample.num_tokens)
    facts = np.zeros(len(ids), dtype=bool)
    for position, fact in sample.facts:
        facts[position : position + len(fact)] = True
    starts = tuple(f"[start {index}]" for index in range(len(config.start_ids)))
    memory = tuple(f"[mem {index}]" for index in range(config.num_memory_tokens))
    separators = tuple(f"[sep {index}]" for index in range(len(config.separator_ids)))
    ends = tuple(f"[end {index}]" for index in range(len(config.end_ids)))
    queries = (*starts, *memory, *separators)
    maps = segment_attention(memory_model, torch.from_numpy(ids.astype(np.int64)))
    bounds = segment_bounds(len(ids), config.segment_length, config.alignment)
    segments = []
    for weights, (start, stop) in zip(maps, bounds, strict=True):
        words = tuple(sample.tokenizer.decode([token]) for token in ids[start:stop].tolist())
        keys = (*queries, *words, *ends)
        is_memory, is_fact = (torch.zeros(len(keys), dtype=torch.bool) for _ in range(2))
        is_memory[len(starts) : len(starts) + len(memory)] = True
        text = slice(len(queries), len(queries) + len(words))
        is_fact[text] = torch.from_numpy(facts[start:stop])
        segments.append(
            SegmentMap(
                weights=weights[:, :, : len(queries)],
                query_labels=queries,
                key_labels=keys,
                is_memory=is_memory,
                is_fact=is_fact,
            )
        )
    return MemoryAttention(segments=tuple(segments))


def plot_memory_attention(
    attention: MemoryAttention, head: Head, path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Plot the attention of memory and special tokens in all segments, for one head.

    Segments stand side by side, divided by white lines; the tokens of facts are underlined.

    Args:
        attention: What `memory_attention` returned.
        head: Which head.
        path: The PNG file to write; its folder must exist.
        title: Put before the name of the head.

    Returns:
        The path of the file.

    Raises:
        ImportError: If matplotlib is missing.
    """
    segments = attention.segments
    weights = torch.cat([segment.weights[head.layer, head.head] for segment in segments], dim=1)
    is_fact = torch.cat([segment.is_fact for segment in segments])
    edges = np.cumsum([0, *(len(segment.key_labels) for segment in segments)]).tolist()
    with figure_axes(path) as axes:
        axes.grid(visible=False)
        # weights of a few hundredths are what most attention is made of
        image = axes.imshow(
            weights.sqrt().numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1,
            interpolation="nearest",
        )  # fmt: skip
        axes.figure.colorbar(image, ax=axes, label="square root of attention")
        labels = segments[0].query_labels
        below = len(labels) - 0.5
        borders = [edge - 0.5 for edge in edges[1:-1]]
        axes.vlines(borders, -0.5, below, color="white", linewidth=2)
        for place in is_fact.nonzero().flatten().tolist():
            axes.hlines(below, place - 0.5, place + 0.5, color="#D55E00", linewidth=6)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        middles = [(low + high - 1) / 2 for low, high in pairwise(edges)]
        axes.set_xticks(middles, [f"segment {index + 1}" for index in range(len(middles))])
        axes.set(title=f"{title}{': ' if title else ''}layer {head.layer}, head {head.head}")
    return Path(path)

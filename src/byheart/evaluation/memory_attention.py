"""How memory is written, kept and read: attention and gates of its tokens, segment by segment."""

import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor
from torch.nn import functional

from byheart.adapters.attention_maps import segment_attention
from byheart.adapters.families import whole_window_layers
from byheart.adapters.recurrent import RecurrentMemory
from byheart.data.tasks import TaskSample
from byheart.evaluation.plots import figure_axes
from byheart.ops.segments import segment_bounds

__all__ = [
    "Head",
    "MemoryAttention",
    "SegmentMap",
    "memory_attention",
    "plot_memory_attention",
    "plot_memory_gates",
]

_FACT_COLOUR, _QUESTION_COLOUR = "#D55E00", "#0072B2"


class Head(NamedTuple):
    """An attention head, both counted from 0."""

    layer: int
    """Its layer."""
    head: int
    """Its place in the layer."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SegmentMap:
    """Attention in one segment, of what stands before the text and of the question."""

    weights: Float[Tensor, "layers heads query key"]
    """Attention of the queries `query_labels` over the keys `key_labels`; each row sums to 1."""
    query_labels: tuple[str, ...]
    """Special tokens and memory; in the last segment also the question."""
    key_labels: tuple[str, ...]
    """Everything in the window."""
    is_memory: Bool[Tensor, " key"]
    """Keys that are memory."""
    is_fact: Bool[Tensor, " key"]
    """Keys that belong to a fact."""
    is_question: Bool[Tensor, " key"]
    """Keys that belong to the question; in the last segment alone."""
    is_answer: Bool[Tensor, " query"]
    """Queries that the answer is read from; in the last segment alone."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MemoryAttention:
    """Attention of memory in a document."""

    segments: tuple[SegmentMap, ...]
    """One per segment."""
    sees_all: Bool[Tensor, " layers"]
    """Layers that see the whole window. In the others memory stands among its neighbours, which it
    attends to whatever it is for."""
    gates: Float[Tensor, "segments memory"] | None
    """How much of each memory token each segment has rewritten, from 0 to 1; `None` for a memory
    without gates."""

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
        """Give how much each head answers from memory: attention of the answer's tokens to memory.

        Returns:
            Sum over the memory, mean over those tokens, in the last segment.
        """
        last = self.segments[-1]
        to_memory = last.weights[:, :, last.is_answer][..., last.is_memory].sum(dim=-1)
        return to_memory.mean(dim=-1)

    def telling_heads(self) -> dict[str, Head]:
        """Choose the heads that write, keep and read most, of layers that see the whole window.

        Returns:
            A head for each of `write`, `keep` and `read`.
        """
        scores = {"write": self.written(), "keep": self.kept(), "read": self.read()}
        num_heads = self.segments[0].weights.shape[1]
        local = ~self.sees_all[:, None]
        return {
            name: Head(*divmod(int(score.masked_fill(local, -1).argmax()), num_heads))
            for name, score in scores.items()
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
            "sees_all": self.sees_all.tolist(),
            "gates": None if self.gates is None else self.gates.tolist(),
            "labels": [list(segment.key_labels) for segment in self.segments],
            "query_labels": [list(segment.query_labels) for segment in self.segments],
        }


def memory_attention(memory_model: RecurrentMemory, sample: TaskSample) -> MemoryAttention:
    """Read a document and look at the attention of memory, special tokens and question.

    The answer is read from the first token of the window, `[CLS]`, or from the mean over the window
    (`encoder.pooling=mean`). In a mean every token has the same share, but only those of the
    question know what is asked: there, reading is measured.

    Args:
        memory_model: An encoder with memory.
        sample: The document, short enough to be held as a whole.

    Returns:
        The attention in each segment.

    Raises:
        ValueError: If the model has no memory tokens, or is no encoder.

    Source:
        Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT, "Attention
        Patterns of Memory Operations" (arXiv:2304.11062).
    """
    config = memory_model.memory_config
    if not config.num_memory_tokens:
        msg = "The model must have memory tokens to look at, got num_memory_tokens=0."
        raise ValueError(msg)
    ids = sample.tokens(0, sample.num_tokens)
    found = segment_attention(memory_model, torch.from_numpy(ids.astype(np.int64)))
    bounds = segment_bounds(len(ids), config.segment_length, config.alignment)
    segments = [
        _segment_map(memory_model, sample, ids, weights, start, stop)
        for (weights, _), (start, stop) in zip(found, bounds, strict=True)
    ]
    gates = [opened for _, opened in found if opened is not None]
    layers = whole_window_layers(memory_model.model, found[-1].weights.shape[-1])
    return MemoryAttention(
        segments=tuple(segments),
        sees_all=torch.tensor(layers),
        gates=torch.stack(gates) if gates else None,
    )


def _segment_map(
    memory_model: RecurrentMemory,
    sample: TaskSample,
    ids: Int32[np.ndarray, " token"],
    weights: Float[Tensor, "layers heads window _window"],
    start: int,
    stop: int,
) -> SegmentMap:
    """Name and mark what stands in the window of the tokens from `start` to `stop`.

    Returns:
        The attention of the queries that are looked at.
    """
    config = memory_model.memory_config
    is_last = stop == len(ids)
    facts, question = (np.zeros(len(ids), dtype=bool) for _ in range(2))
    for position, fact in sample.facts:
        facts[position : position + len(fact)] = True
    if is_last:
        question[len(ids) - sample.question_length :] = True
    starts = tuple(f"[start {index}]" for index in range(len(config.start_ids)))
    memory = tuple(f"[mem {index}]" for index in range(config.num_memory_tokens))
    separators = tuple(f"[sep {index}]" for index in range(len(config.separator_ids)))
    ends = tuple(f"[end {index}]" for index in range(len(config.end_ids)))
    before = (*starts, *memory, *separators)
    words = tuple(sample.tokenizer.decode([token]) for token in ids[start:stop].tolist())
    keys = (*before, *words, *ends)
    is_memory, is_fact, is_question = (torch.zeros(len(keys), dtype=torch.bool) for _ in range(3))
    is_memory[len(starts) : len(starts) + len(memory)] = True
    text = slice(len(before), len(before) + len(words))
    is_fact[text] = torch.from_numpy(facts[start:stop])
    is_question[text] = torch.from_numpy(question[start:stop])
    is_query = is_question.clone()
    is_query[: len(before)] = True
    is_answer = torch.zeros_like(is_query)
    if is_last and getattr(memory_model.config, "classifier_pooling", "cls") == "mean":
        is_answer = is_question
    elif is_last:
        is_answer[0] = True
    return SegmentMap(
        weights=weights[:, :, is_query],
        query_labels=tuple(keys[place] for place in is_query.nonzero().flatten().tolist()),
        key_labels=keys,
        is_memory=is_memory,
        is_fact=is_fact,
        is_question=is_question,
        is_answer=is_answer[is_query],
    )


def plot_memory_attention(
    attention: MemoryAttention, head: Head, path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Plot the attention of memory, special tokens and question in all segments, for one head.

    Segments stand side by side, divided by white lines; the tokens of facts are underlined in
    orange, those of the question in blue. The question's rows are empty where it does not stand.

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
    labels = max((segment.query_labels for segment in segments), key=len)
    parts = [segment.weights[head.layer, head.head] for segment in segments]
    weights = torch.cat(
        [
            functional.pad(part, (0, 0, 0, len(labels) - len(part)), value=math.nan)
            for part in parts
        ],
        dim=1,
    )
    edges = np.cumsum([0, *(len(segment.key_labels) for segment in segments)]).tolist()
    with figure_axes(path) as axes:
        axes.grid(visible=False)
        # weights of a few hundredths are what most attention is made of
        image = axes.imshow(
            weights.sqrt().numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1,
            interpolation="nearest",
        )  # fmt: skip
        axes.figure.colorbar(image, ax=axes, label="square root of attention")
        borders = [edge - 0.5 for edge in edges[1:-1]]
        axes.vlines(borders, -0.5, len(labels) - 0.5, color="white", linewidth=2)
        for segment, edge in zip(segments, edges, strict=False):
            below = len(segment.query_labels) - 0.5
            for mask, colour in (
                (segment.is_fact, _FACT_COLOUR),
                (segment.is_question, _QUESTION_COLOUR),
            ):
                for place in mask.nonzero().flatten().tolist():
                    left = edge + place - 0.5
                    axes.hlines(below, left, left + 1, color=colour, linewidth=6)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        middles = [(low + high - 1) / 2 for low, high in pairwise(edges)]
        axes.set_xticks(middles, [f"segment {index + 1}" for index in range(len(middles))])
        axes.set(title=f"{title}{': ' if title else ''}layer {head.layer}, head {head.head}")
    return Path(path)


def plot_memory_gates(
    attention: MemoryAttention, path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Plot how much of each memory token each segment has rewritten.

    Args:
        attention: What `memory_attention` returned, of a memory with gates.
        path: The PNG file to write; its folder must exist.
        title: Put before what the figure shows.

    Returns:
        The path of the file.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the memory has no gates.
    """
    if attention.gates is None:
        msg = "The memory must have gates to plot, got one without. Train with update='gated'."
        raise ValueError(msg)
    gates = attention.gates.T
    with figure_axes(path) as axes:
        axes.grid(visible=False)
        image = axes.imshow(gates.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axes.figure.colorbar(image, ax=axes, label="share rewritten")
        for token, row in enumerate(gates.tolist()):
            for place, opened in enumerate(row):
                colour = "black" if opened > 0.6 else "white"
                axes.text(
                    place, token, f"{opened:.2f}", color=colour, fontsize=7, ha="center",
                    va="center",
                )  # fmt: skip
        names = [
            f"segment {index + 1}{', fact' if segment.is_fact.any() else ''}"
            for index, segment in enumerate(attention.segments)
        ]
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(gates)), [f"[mem {index}]" for index in range(len(gates))])
        axes.set(title=f"{title}{': ' if title else ''}how far each memory token's gate opened")
    return Path(path)

"""Recurrent memory around any model: one functional step, and its unrolling over segments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.replay import replayed
from byheart.models.window import Window, build_window


class Encoded(NamedTuple):
    """What a model makes of a window."""

    hidden: Float[Tensor, "rows window embed_dim"]
    """Last hidden states, from which the memory is read."""
    output: Any
    """What was requested of the segment: a tensor, or a named tuple of tensors and `None`; `None`
    for nothing."""
    reader: "WindowModel | None" = None
    """What reads the next segment; `None` for the same."""


@runtime_checkable
class WindowModel(Protocol):
    """A model that recurrent memory can be put around.

    It is a value: a call changes nothing of it. What a model remembers besides the memory is in
    the reader that a call returns for the next segment, and carries no gradient. Every row is
    treated alone.
    """

    embed_dim: int
    """Width of its input embeddings and last hidden states."""
    embedding: nn.Module
    """Its input embedding: token ids to vectors."""
    writes: bool
    """Whether memory is written behind the text (decoders), or in the places it is read."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the model's parameters, for replay."""
        ...

    def __call__(self, window: Window, request: Any) -> Encoded:
        """Read a window.

        Args:
            window: Embeddings and mask.
            request: What is wanted of the segment, in this model's own terms; `None` for the
                memory alone.

        Returns:
            Hidden states and the requested output.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One step: the next segment of all rows that have one."""

    input_ids: Int[Tensor, "rows text"]
    """Text of those rows."""
    num_tokens: Int[Tensor, " rows"] | None
    """Text tokens of each, the first so many columns; `None` for all."""
    rows: Int[Tensor, " rows"] | None
    """Which rows of the batch; `None` for all, in order."""
    writes_memory: Tensor | None
    """Rows (bool, of those above) whose segment is complete; `None` for all. The others read
    memory, and leave it as it was."""
    request: Any
    """What is wanted of the segment, see `WindowModel`; `None` for the memory alone."""
    has_loss: bool
    """Whether a gradient starts here."""


class Stepped(NamedTuple):
    """What one step gives."""

    memory: Float[Tensor, "rows memory embed_dim"]
    """The next memory of its rows, float32."""
    output: Any
    """What was requested."""
    reader: WindowModel
    """What reads the next segment."""


class Unrolled(NamedTuple):
    """What segments one after the other give."""

    outputs: list[Any]
    """What was requested of each segment."""
    memory: Float[Tensor, "batch memory embed_dim"]
    """Memory after the last."""
    reader: WindowModel
    """What reads the segment behind the last."""


class RecurrentCore(nn.Module):
    """The weights that recurrent memory adds to a model, and the recurrence.

    Source:
        Bulatov, Kuratov, Burtsev 2022 (arXiv:2207.06881) and 2023 (arXiv:2304.11062).
    """

    def __init__(
        self, config: RecurrentMemoryConfig, embed_dim: int, *, mean: Tensor, std: Tensor
    ) -> None:
        """Add memory to a model of width `embed_dim`.

        Args:
            config: The memory.
            embed_dim: Width of the model's input embeddings.
            mean: Mean of its token embeddings, per number; the normalised memory starts there.
            std: Their standard deviation, per number.
        """
        super().__init__()
        self.config = config
        # independent vectors: memory tokens that start equal would stay equal
        self.memory = nn.Parameter(torch.randn(config.num_memory_tokens, embed_dim) * std.mean())
        self.norm: nn.LayerNorm | None = None
        if config.normalize_memory:
            self.norm = nn.LayerNorm(embed_dim)
            with torch.no_grad():
                self.norm.weight.copy_(std)
                self.norm.bias.copy_(mean)
        self.gate: nn.Linear | None = None
        if config.update == "gated":
            self.gate = nn.Linear(2 * embed_dim, embed_dim)
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, config.gate_bias_init)

    def step(
        self,
        model: WindowModel,
        segment: Segment,
        memory: Float[Tensor, "rows memory embed_dim"],
    ) -> Stepped:
        """Read one segment.

        Args:
            model: What reads the window.
            segment: The segment.
            memory: Memory of its rows.

        Returns:
            The next memory of those rows, the requested output, and the next reader.

        Raises:
            ValueError: If the model returns fewer hidden states than positions.
        """
        window = build_window(
            self.config,
            model.embedding,
            memory,
            segment.input_ids,
            segment.num_tokens,
            writes=model.writes,
            complete=segment.writes_memory,
        )
        encoded = model(window, segment.request)
        if encoded.hidden.shape[1] != window.embeddings.shape[1]:
            msg = (
                "The model must return one hidden state per position, got "
                f"{encoded.hidden.shape[1]} for {window.embeddings.shape[1]}. Use a model that "
                "pools none."
            )
            raise ValueError(msg)
        written = self._update(memory, _written(window, encoded.hidden, memory.shape[1]))
        if segment.writes_memory is not None:
            written = torch.where(segment.writes_memory[:, None, None], written, memory)
        following = model if encoded.reader is None else encoded.reader
        return Stepped(written, encoded.output, following)

    def _update(self, old: Tensor, written: Tensor) -> Tensor:
        if not old.shape[1]:
            return old
        # the memory travels through every segment: its own rounding would add up
        written = written.float()
        if self.norm is not None:
            written = self.norm(written.to(self.norm.weight.dtype)).float()
        if self.gate is not None:
            both = torch.cat([old, written], dim=-1).to(self.gate.weight.dtype)
            written = torch.lerp(old, written, torch.sigmoid(self.gate(both).float()))
        if self.training and self.config.noise > 0:
            spread = written.detach().std(dim=(1, 2), keepdim=True)
            written = written + self.config.noise * spread * torch.randn_like(written)
        return written

    def unroll(
        self,
        model: WindowModel,
        segments: Sequence[Segment],
        memory: Float[Tensor, "batch memory embed_dim"],
    ) -> Unrolled:
        """Read segments one after the other.

        A loss reaches `config.bptt_depth` segments, its own included. Where several segments have
        a loss, each is unrolled from the detached memory that lies so many segments before it: so
        the limit holds for each of them exactly, and the segments are computed that many times.

        Args:
            model: What reads the windows.
            segments: The segments, in order.
            memory: Memory of all rows before the first.

        Returns:
            The requested output of each segment, and memory and reader after the last.
        """
        depth = self.config.bptt_depth
        losses = [index for index, segment in enumerate(segments) if segment.has_loss]
        if depth is None or depth >= len(segments) or not torch.is_grad_enabled() or not losses:
            return self._run(model, segments, memory)
        outputs: list[Any] = [None] * len(segments)
        position = 0  # `memory` and `model` are those before this segment, `ahead` those after it
        ahead: Unrolled | None = None
        for index in losses:
            start = max(0, index + 1 - depth)
            if start > position and ahead is not None:
                position, memory, model = position + 1, ahead.memory.detach(), ahead.reader
            with torch.no_grad():
                skipped = _without_requests(segments[position:start], outputs[position:start])
                before, memory, model = self._run(model, skipped, memory)
            _fill(outputs, before, position)
            position = start
            window = [
                replace(segment, request=None) if segment.has_loss and place != index else segment
                for place, segment in enumerate(segments[start : index + 1], start)
            ]
            ahead = self._run(model, window[:1], memory)
            after = self._run(ahead.reader, window[1:], ahead.memory)
            _fill(outputs, ahead.outputs + after.outputs, start)
        rest = losses[-1] + 1
        with torch.no_grad():
            last = self._run(after.reader, segments[rest:], after.memory.detach())
        outputs[rest:] = last.outputs
        return last._replace(outputs=outputs)

    def _run(self, model: WindowModel, segments: Sequence[Segment], memory: Tensor) -> Unrolled:
        if self.config.replay and segments and torch.is_grad_enabled():
            return self._replay(model, segments, memory)
        outputs = []
        for segment in segments:
            memory, output, model = self._read(model, segment, memory)
            outputs.append(output)
        return Unrolled(outputs, memory, model)

    def _replay(self, model: WindowModel, segments: Sequence[Segment], memory: Tensor) -> Unrolled:
        readers = [model]

        def read(index: int, before: Tensor) -> tuple[Tensor, Any]:
            after, output, following = self._read(readers[index], segments[index], before)
            if len(readers) == index + 1:  # forward: backward reads with what forward read with
                readers.append(following)
            return after, output

        weights = [
            weight for weight in (*self.parameters(), *model.parameters()) if weight.requires_grad
        ]
        outputs, memory = replayed(read, len(segments), memory, weights)
        return Unrolled(outputs, memory, readers[-1])

    def _read(self, model: WindowModel, segment: Segment, memory: Tensor) -> Stepped:
        if segment.rows is None:
            return self.step(model, segment, memory)
        stepped = self.step(model, segment, memory[segment.rows])
        return stepped._replace(memory=memory.index_copy(0, segment.rows, stepped.memory))


def _without_requests(segments: Sequence[Segment], known: Sequence[Any]) -> list[Segment]:
    """Ask nothing of segments whose output is known.

    Returns:
        The segments.
    """
    return [
        segment if output is None else replace(segment, request=None)
        for segment, output in zip(segments, known, strict=True)
    ]


def _fill(outputs: list[Any], new: list[Any], start: int) -> None:
    """Keep the first output of each segment: windows that follow read it again."""
    for place, output in enumerate(new, start):
        if outputs[place] is None:
            outputs[place] = output


def _written(window: Window, hidden: Tensor, num_memory: int) -> Tensor:
    if window.write_columns is None:
        # a copy: a view would keep the hidden states of the whole window
        return hidden[:, window.memory_start : window.memory_start + num_memory].clone()
    columns = window.write_columns[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, columns)

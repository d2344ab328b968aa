"""Recurrent memory around any model: one functional step, and its unrolling over segments."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.replay import replayed
from byheart.models.window import Window, build_window
from byheart.models.window_model import Segment, WindowModel


class Stepped(NamedTuple):
    """What one step gives."""

    memory: Float[Tensor, "rows memory embed_dim"]
    """The next memory of its rows, float32."""
    output: Any
    """What was requested."""
    reader: WindowModel
    """What reads the next segment."""
    opened: Float[Tensor, "rows memory"] | None
    """How much of each memory token was rewritten, from 0 to 1; 0 where the segment is not
    complete. `None` without a gate."""


class _Read(NamedTuple):
    """What is kept of a segment that was read."""

    output: Any
    write_share: Tensor | None


class _Run(NamedTuple):
    """What segments one after the other leave."""

    reads: list[_Read]
    memory: Tensor
    reader: WindowModel


class Unrolled(NamedTuple):
    """What segments one after the other give."""

    outputs: list[Any]
    """What was requested of each segment."""
    memory: Float[Tensor, "batch memory embed_dim"]
    """Memory after the last."""
    reader: WindowModel
    """What reads the segment behind the last."""
    write_share: Float[Tensor, ""] | None
    """How much of its memory a complete segment has rewritten, from 0 to 1: mean over rows and over
    the segments that a loss reaches, if it does not reach all. `None` without a gate."""


# a sigmoid stretched by this much on both sides and cut to [0, 1] reaches both ends: Louizos et al.
# 2018, "hard concrete" (arXiv:1712.01312)
_STRETCH = 0.1


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
        first = torch.randn(config.num_memory_tokens, embed_dim)
        self.memory = nn.Parameter(first * std.mean().to(first.device))
        self.norm: nn.LayerNorm | None = None
        if config.normalize_memory:
            self.norm = nn.LayerNorm(embed_dim)
            with torch.no_grad():
                self.norm.weight.copy_(std)
                self.norm.bias.copy_(mean)
        self.gate: nn.Linear | None = None
        if config.update == "gated":
            self.gate = nn.Linear(2 * embed_dim, 1)
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
        hidden = _written(window, encoded.hidden, memory.shape[1])
        written, opened = self._update(memory, hidden)
        if segment.writes_memory is not None:
            written = torch.where(segment.writes_memory[:, None, None], written, memory)
            opened = None if opened is None else opened * segment.writes_memory[:, None]
        following = model if encoded.reader is None else encoded.reader
        return Stepped(written, encoded.output, following, opened)

    def _update(self, old: Tensor, written: Tensor) -> tuple[Tensor, Tensor | None]:
        if not old.shape[1]:
            return old, None
        # the memory travels through every segment: its own rounding would add up
        written = written.float()
        if self.norm is not None:
            written = self.norm(written.to(self.norm.weight.dtype)).float()
        opened = None
        if self.gate is not None:
            opened = self._open(old, written)
            written, opened = torch.lerp(old, written, opened), opened.squeeze(2)
        if self.training and self.config.noise > 0:
            spread = written.detach().std(dim=(1, 2), keepdim=True)
            written = written + self.config.noise * spread * torch.randn_like(written)
        return written, opened

    def _open(self, old: Tensor, written: Tensor) -> Float[Tensor, "rows memory 1"]:
        """Say how much of each memory token is rewritten.

        Returns:
            0, which keeps it exactly as it was, to 1.
        """
        assert self.gate is not None
        both = torch.cat([old, written], dim=-1).to(self.gate.weight.dtype)
        logits = self.gate(both).float()
        if self.training and self.config.gate_noise > 0:
            # gates that must work in spite of it learn to be clearly open or closed
            logits = logits + self.config.gate_noise * torch.randn_like(logits)
        stretched = (1 + 2 * _STRETCH) * torch.sigmoid(logits) - _STRETCH
        return stretched.clamp(0, 1)

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
        reads, memory, model = self._unroll(model, segments, memory)
        share = _mean_share(reads, segments)
        return Unrolled([read.output for read in reads], memory, model, share)

    def _unroll(self, model: WindowModel, segments: Sequence[Segment], memory: Tensor) -> _Run:
        depth = self.config.bptt_depth
        losses = [index for index, segment in enumerate(segments) if segment.has_loss]
        if depth is None or depth >= len(segments) or not torch.is_grad_enabled() or not losses:
            return self._run(model, segments, memory, is_whole=True)
        reads: list[_Read | None] = [None] * len(segments)
        first, begun, rows = memory, set[int](), _rows_of(segments, len(memory))
        position = 0  # `memory` and `model` are those before this segment, `ahead` those after it
        ahead: _Run | None = None
        for index in losses:
            start = max(0, index + 1 - depth)
            begun.update(*rows[position:start])
            if start > position and ahead is not None:
                position, memory, model = position + 1, ahead.memory.detach(), ahead.reader
            with torch.no_grad():
                skipped = _without_requests(segments[position:start], reads[position:start])
                before, memory, model = self._run(model, skipped, memory)
            _fill(reads, before, position)
            late = sorted(set().union(*rows[start : index + 1]) - begun)
            if start and late:
                # the first memory of rows that begin here is inside of the limit, and learns
                is_late = torch.zeros(len(memory), dtype=torch.bool)
                is_late[late] = True
                memory = torch.where(is_late.to(memory.device)[:, None, None], first, memory)
            position = start
            window = [
                replace(segment, request=None) if segment.has_loss and place != index else segment
                for place, segment in enumerate(segments[start : index + 1], start)
            ]
            ahead = self._run(model, window[:1], memory)
            after = self._run(ahead.reader, window[1:], ahead.memory)
            _fill(reads, ahead.reads + after.reads, start)
        rest = losses[-1] + 1
        with torch.no_grad():
            last = self._run(after.reader, segments[rest:], after.memory.detach())
        _fill(reads, last.reads, rest)
        return last._replace(reads=[read for read in reads if read is not None])

    def _run(
        self,
        model: WindowModel,
        segments: Sequence[Segment],
        memory: Tensor,
        *,
        is_whole: bool = False,
    ) -> _Run:
        if self.config.replay and segments and torch.is_grad_enabled():
            # of many short runs each would keep a segment, and a commit would change what is kept
            keeps_last = is_whole and not model.has_memory
            return self._replay(model, segments, memory, keeps_last=keeps_last)
        reads = []
        for segment in segments:
            memory, read, model = self._read(model, segment, memory)
            reads.append(read)
        return _Run(reads, memory, model)

    def _replay(
        self,
        model: WindowModel,
        segments: Sequence[Segment],
        memory: Tensor,
        *,
        keeps_last: bool,
    ) -> _Run:
        readers = [model]

        def read(index: int, before: Tensor) -> tuple[Tensor, _Read]:
            after, kept, following = self._read(readers[index], segments[index], before)
            if len(readers) == index + 1:  # forward: backward reads with what forward read with
                readers.append(following)
            return after, kept

        weights = [
            weight for weight in (*self.parameters(), *model.parameters()) if weight.requires_grad
        ]
        reads, memory = replayed(read, len(segments), memory, weights, keeps_last=keeps_last)
        return _Run(reads, memory, readers[-1])

    def _read(
        self, model: WindowModel, segment: Segment, memory: Tensor
    ) -> tuple[Tensor, _Read, WindowModel]:
        before = memory if segment.rows is None else memory[segment.rows]
        stepped = self.step(model, segment, before)
        after = stepped.memory
        if segment.rows is not None:
            after = memory.index_copy(0, segment.rows, after)
        share = None if stepped.opened is None else stepped.opened.mean(dim=1)
        return after, _Read(stepped.output, share), stepped.reader


def _rows_of(segments: Sequence[Segment], batch_size: int) -> list[set[int]]:
    """Say which rows read each segment.

    Returns:
        Their numbers.
    """
    everybody = set(range(batch_size))
    return [
        everybody if segment.rows is None else set(segment.rows.tolist()) for segment in segments
    ]


def _without_requests(segments: Sequence[Segment], known: Sequence[_Read | None]) -> list[Segment]:
    """Ask nothing of segments whose output is known.

    Returns:
        The segments.
    """
    return [
        segment if read is None or read.output is None else replace(segment, request=None)
        for segment, read in zip(segments, known, strict=True)
    ]


def _fill(reads: list[_Read | None], new: Sequence[_Read], start: int) -> None:
    """Keep the first output of each segment, and the first share that has a gradient."""
    for place, read in enumerate(new, start):
        known = reads[place]
        if known is None:
            reads[place] = read
            continue
        output = read.output if known.output is None else known.output
        shares = [share for share in (known.write_share, read.write_share) if share is not None]
        share = next((share for share in shares if share.requires_grad), known.write_share)
        reads[place] = _Read(output, share)


def _mean_share(reads: Sequence[_Read], segments: Sequence[Segment]) -> Tensor | None:
    """Average what was rewritten over the rows and segments that are complete.

    Segments that no loss reaches do not count where others have a gradient: what writing costs
    must not depend on how long the document was before.

    Returns:
        The mean; `None` without a gate.
    """
    pairs = [
        (read.write_share, segment)
        for read, segment in zip(reads, segments, strict=True)
        if read.write_share is not None
    ]
    reached = [pair for pair in pairs if pair[0].requires_grad]
    total, count = [], []
    for share, segment in reached or pairs:
        whole = segment.writes_memory
        total.append(share.sum())
        count.append(share.new_full((), len(share)) if whole is None else whole.sum())
    return torch.stack(total).sum() / torch.stack(count).sum().clamp(min=1) if total else None


def _written(window: Window, hidden: Tensor, num_memory: int) -> Tensor:
    if window.write_columns is None:
        # a copy: a view would keep the hidden states of the whole window
        return hidden[:, window.memory_start : window.memory_start + num_memory].clone()
    columns = window.write_columns[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, columns)

"""CUDA graphs of one segment step: reading that waits for no Python and no kernel launches."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from byheart.adapters.families import window_model
from byheart.adapters.recurrent import RecurrentMemory
from byheart.adapters.unmasked import without_needless_masks
from byheart.models.eval_mode import eval_mode
from byheart.models.window_model import Segment

__all__ = ["SegmentGraph", "SegmentGraphs", "can_capture", "capture"]

_WARM_UPS = 3
"""Steps before the recording, as PyTorch advises: libraries choose kernels and allocate in them."""

_WORTH_RECORDING = 16
"""Steps of one shape, read and to come, from which a recording pays for itself."""

_FAMILIES = frozenset(
    {
        "bert", "distilbert", "electra", "gpt2", "gpt_neox", "llama", "mistral", "modernbert",
        "qwen2", "qwen3", "roberta",
    }
)  # fmt: skip
"""Families whose step is known to ask the device for no value once it is recorded."""


def can_capture(device: torch.device) -> bool:
    """Return whether work on a device can be recorded."""
    return device.type == "cuda"


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record what a function does on a GPU.

    Args:
        step: Reads and writes tensors that stay where they are, and asks for no value. It is
            called a few times before.
        device: The GPU.

    Returns:
        Does all of it again, with what is in those tensors then, by one launch. It keeps the
        function, and so the tensors.
    """
    with torch.cuda.device(device), without_needless_masks():
        current = torch.cuda.current_stream()
        # a recording that fails would leave its own stream behind as the current one
        with torch.cuda.stream(current):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    step()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # what other threads do meanwhile, such as loading data, is none of its business
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
    return Recording(graph.replay, step)


@dataclass(frozen=True)
class Recording:
    """What a CUDA graph does, and the function that it was recorded from.

    The graph reads and writes the tensors that the function refers to, wherever they were: none may
    be freed before it.
    """

    replay: Callable[[], None]
    step: Callable[[], None]

    def __call__(self) -> None:
        """Do again what was recorded."""
        self.replay()


class SegmentGraph:
    """The step from memory to memory over a whole segment of all rows, recorded once.

    It computes `RecurrentCore.step`, in evaluation mode and without a gradient, under the autocast
    of the time when it is made.
    """

    def __init__(self, memory_model: RecurrentMemory, rows: int) -> None:
        """Record a step.

        Args:
            memory_model: An encoder or decoder without a memory of its own, on a GPU.
            rows: Rows of every step.
        """
        core, layout = memory_model.memory, memory_model.layout
        device = core.memory.device
        ids = torch.zeros(rows, layout.segment_length, dtype=torch.long, device=device)
        memory = torch.zeros(rows, layout.num_memory_tokens, layout.embed_dim, device=device)
        reader = window_model(memory_model.model)
        segment = Segment(
            input_ids=ids,
            num_tokens=None,
            rows=None,
            writes_memory=None,
            request=None,
            has_loss=False,
        )

        kind = device.type
        # weights that autocast keeps converted go when its context ends; replays would still read
        # them, so the conversion is part of the recording
        autocast = torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )

        def step() -> None:
            with torch.no_grad(), eval_mode(memory_model), autocast:
                memory.copy_(core.step(reader, segment, memory).memory)

        self.device = device
        self._ids, self._memory = ids, memory
        self._replay = capture(step, device)

    @torch.no_grad()
    def start(self, memory: Float[Tensor, "rows memory embed_dim"]) -> None:
        """Set what the next segment reads."""
        self._memory.copy_(memory)

    @torch.no_grad()
    def read(self, input_ids: Int[Tensor, "rows text"]) -> None:
        """Read whole segments one after the other; nothing is waited for.

        Args:
            input_ids: Their tokens, on the device: a multiple of the length of a segment.
        """
        for ids in torch.split(input_ids, self._ids.shape[1], dim=1):
            self._ids.copy_(ids)
            self._replay()

    def memory(self) -> Float[Tensor, "rows memory embed_dim"]:
        """Copy what the last segment has written.

        Returns:
            The memory, no longer changed by the graph.
        """
        return self._memory.clone()


class SegmentGraphs:
    """Which stretches of segments are read by a graph, and the graph; for one use of a model."""

    def __init__(self, memory_model: RecurrentMemory, wanted: bool | None) -> None:
        """Decide whether graphs can be used.

        Args:
            memory_model: The model.
            wanted: Whether they shall be: `None` for where it is known to work and pays.

        Raises:
            ValueError: If they are wanted and impossible.
        """
        self._memory_model = memory_model
        self._must = wanted is True
        obstacle = _obstacle(memory_model)
        if self._must and obstacle is not None:
            msg = f"cuda_graphs=True needs {obstacle}. Leave it out to read without graphs."
            raise ValueError(msg)
        self._is_on = self._must or (
            wanted is None and obstacle is None and _is_known(memory_model)
        )
        self._graph: SegmentGraph | None = None
        self._key: tuple[object, ...] = ()
        self._num_read = 0

    def are_for(self, rows: int, num_segments: int) -> bool:
        """Decide whether a stretch of whole segments of all rows is read by a graph.

        Args:
            rows: Rows.
            num_segments: Length of the stretch.

        Returns:
            Whether it is, by `graph`, or in the ordinary way.

        Raises:
            RuntimeError: If graphs are wanted, and the step cannot be recorded.
        """
        if not self._is_on or not num_segments:
            return False
        key = self._situation(rows)
        if key != self._key:
            # the old one first: the next can use its memory
            self._graph, self._key, self._num_read = None, key, 0
        known = self._num_read + num_segments
        if self._graph is None and (self._must or known >= _WORTH_RECORDING):
            self._graph = self._record(rows)
        return self._graph is not None

    def add(self, num_segments: int) -> None:
        """Count whole segments of all rows that were read in the ordinary way.

        Args:
            num_segments: How many.
        """
        self._num_read += num_segments

    @property
    def graph(self) -> SegmentGraph:
        """The graph for the stretch last asked about, if there is one."""
        assert self._graph is not None
        return self._graph

    def _record(self, rows: int) -> SegmentGraph | None:
        try:
            return SegmentGraph(self._memory_model, rows)
        except torch.OutOfMemoryError:
            if self._must:
                raise
            msg = (
                f"A CUDA graph of {rows} rows needs more memory than the GPU has left, so they are "
                "read without one. Read fewer rows, or pass cuda_graphs=False."
            )
            warnings.warn(msg, RuntimeWarning, stacklevel=5)
            self._is_on = False
            return None
        except RuntimeError as error:
            name = type(self._memory_model.model).__name__
            msg = (
                f"A segment step of {name} must do the same on the device whatever it reads, to be "
                f"recorded as a CUDA graph, got: {error}. Pass cuda_graphs=False."
            )
            if self._must:
                raise RuntimeError(msg) from error
            warnings.warn(f"{msg} It is read without graphs.", RuntimeWarning, stacklevel=5)
            self._is_on = False
            return None

    def _situation(self, rows: int) -> tuple[object, ...]:
        # a graph reads weights from where they were, as they were converted then
        model, kind = self._memory_model, self._memory_model.memory.memory.device.type
        return (
            rows,
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
            *((tensor.data_ptr(), tensor.dtype) for tensor in _tensors(model)),
        )


def _tensors(memory_model: RecurrentMemory) -> Iterator[Tensor]:
    return chain(memory_model.parameters(), memory_model.buffers())


def _obstacle(memory_model: RecurrentMemory) -> str | None:
    """Say what a model would have to be for its step to be recorded.

    Returns:
        What it is not; `None` if nothing is in the way.
    """
    layout = memory_model.layout
    device = memory_model.memory.memory.device
    if not can_capture(device):
        return f"a model on a CUDA device, got one on {device}"
    others = {tensor.device for tensor in _tensors(memory_model)} - {device}
    if others:
        return f"all weights on one device, got {device} and {', '.join(map(str, others))}"
    if layout.inner is not None:
        return "a model whose only state is the memory, got one with an XL cache or kNN memory"
    if not layout.num_memory_tokens:
        return "memory tokens, got num_memory_tokens 0"
    if memory_model.memory_config.alignment == "center":
        return "segments of one length, got alignment 'center'"
    return None


def _is_known(memory_model: RecurrentMemory) -> bool:
    config = memory_model.config
    attention = getattr(config, "_attn_implementation", None)
    family = getattr(config, "model_type", None)
    # eager attention copies a number from main memory when it makes its mask
    is_plain = isinstance(memory_model.model, PreTrainedModel)
    return is_plain and family in _FAMILIES and attention == "sdpa"

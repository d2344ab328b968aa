"""A language model with memory for EleutherAI's lm-evaluation-harness, and its tasks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int32

from byheart.data.tokenize import Tokenizer
from byheart.evaluation.continuations import score_continuations, score_tokens
from byheart.evaluation.reading import evaluating
from byheart.models.generate import SamplingConfig, generate
from byheart.models.segment_model import SegmentModel

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as err:
    msg = "The suite lm-eval needs EleutherAI's lm-eval. Install it: pip install 'byheart[eval]'."
    raise ImportError(msg) from err

__all__ = ["HarnessModel", "evaluate_with_harness", "find_tasks"]

# tokens generated between two looks for a stop text
_TOKENS_AT_ONCE = 16
_MAX_NEW_TOKENS = 256

ItemT = TypeVar("ItemT")


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks of a model, answered with memory: no text is cut, however long.

    Every request is a document of its own and begins with an empty memory. Continuations of the
    same text are scored after reading it once.

    Args:
        model: A language model with memory.
        tokenizer: Its tokenizer.
        rows: Texts read side by side.
        memory_size: Entries per row and head of the kNN memory; `None` for what the model has.
    """

    def __init__(
        self,
        model: SegmentModel,
        tokenizer: Tokenizer,
        *,
        rows: int = 8,
        memory_size: int | None = None,
    ) -> None:
        super().__init__()
        self._model = model
        self._tokens = tokenizer
        self._num_rows = rows
        self._memory_size = memory_size

    @property
    def eot_token_id(self) -> int:
        """The start token, which also ends a text.

        Raises:
            ValueError: If the tokenizer has none.
        """
        start_id = self._tokens.start_id
        if start_id is None:
            msg = (
                "The tokenizer must have a start token, for texts without a context, and has none. "
                "Use tasks that give one."
            )
            raise ValueError(msg)
        return start_id

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's cache of requests."""
        return self._tokens.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Turn a text into ids, after a start token if there is one.

        Args:
            string: The text.
            add_special_tokens: `False` leaves the start token out.

        Returns:
            The ids.
        """
        start_id = self._tokens.start_id
        start = [] if start_id is None or add_special_tokens is False else [start_id]
        return [*start, *self._tokens.encode(string).tolist()]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **_options: object,
    ) -> list[tuple[float, bool]]:
        # the continuations of each different text, with the places of their requests
        wanted: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            wanted.setdefault(tuple(context), []).append((place, continuation))
        # texts of like length side by side, the longest first: too long shows at once
        contexts = sorted(wanted, key=len, reverse=True)
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for some in _batches(contexts, self._num_rows):
            texts = [_Ids(context) for context in some]
            continuations = [[ids for _, ids in wanted[context]] for context in some]
            with evaluating(self._model):
                found = score_continuations(
                    self._model, texts, continuations, memory_size=self._memory_size
                )
            for asked, row in zip(map(wanted.__getitem__, some), found, strict=True):
                for (place, _), score in zip(asked, row, strict=True):
                    scores[place] = (score.log_likelihood, score.is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], scores[place])
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, each token after all that come before it.

        Args:
            requests: The texts.
            disable_tqdm: Not used.

        Returns:
            Log-likelihood of each text, in nats.
        """
        found = []
        for some in _batches(requests, self._num_rows):
            ids = [[self.eot_token_id, *self.tok_encode(r.args[0], False)] for r in some]
            with evaluating(self._model):
                state = self._model.new_state(len(ids), memory_size=self._memory_size)
                found += [
                    score.log_likelihood for score in score_tokens(self._model, ids, state).scores
                ]
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until one of their stop texts.

        Args:
            requests: Texts, and how to continue them: `until`, `max_gen_toks`, and for sampling
                `do_sample`, `temperature`, `top_k`, `top_p`.
            disable_tqdm: Not used.

        Returns:
            The continuations, without the stop text.
        """
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        left = int(options.get("max_gen_toks", _MAX_NEW_TOKENS))
        sampling = SamplingConfig(temperature=0.0)
        if options.get("do_sample"):
            sampling = SamplingConfig(
                temperature=options.get("temperature", 1.0),
                top_k=options.get("top_k"),
                top_p=options.get("top_p"),
            )
        prompt = self.tok_encode(context)
        new: list[int] = []
        with evaluating(self._model):
            state = self._model.new_state(1, memory_size=self._memory_size)
            while left > 0:
                given = torch.tensor([prompt], device=state.position.device)
                out = generate(
                    self._model,
                    given,
                    state=state,
                    max_new_tokens=min(left, _TOKENS_AT_ONCE),
                    sampling=sampling,
                    stop_id=self._tokens.start_id,
                )
                tokens = out.tokens[0, : int(out.num_tokens[0])].tolist()
                state, prompt = out.state, tokens[-1:]
                left -= len(tokens)
                new += tokens
                text = self._tokens.decode(new)
                ends = [text.find(stop) for stop in stops if stop and stop in text]
                if ends:
                    return text[: min(ends)]
                if tokens[-1] == self._tokens.start_id:
                    break
        return self._tokens.decode(new)


def find_tasks(tasks: Sequence[str], include_path: Path | None = None) -> TaskManager:
    """Find tasks by their names.

    The harness's own are thousands of files, which takes it ten seconds to look through. That is
    done only if one is asked for that `include_path` does not have.

    Args:
        tasks: Names of tasks.
        include_path: Folder with more tasks.

    Returns:
        What knows them, for any number of calls of `evaluate_with_harness`.

    Raises:
        ValueError: If there is no such task.
    """
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        # groups and patterns may mean tasks of the harness, too
        if set(tasks) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    _require_tasks(manager, tasks)
    return manager


def evaluate_with_harness(
    model: SegmentModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    manager: TaskManager | None = None,
    rows: int = 8,
    memory_size: int | None = None,
) -> dict[str, Any]:
    """Measure a model on tasks of the harness.

    Args:
        model: A language model with memory.
        tokenizer: Its tokenizer.
        tasks: Names of tasks.
        num_fewshot: Solved examples before each question; `None` for what the task says.
        limit: Only the first so many questions of each task.
        manager: Tasks to choose from, as `find_tasks` gives them; `None` for the harness's own.
        rows: Texts read side by side.
        memory_size: Entries per row and head of the kNN memory; `None` for what the model has.

    Returns:
        What the harness's `simple_evaluate` gives: `results`, `versions`, `n-samples` and more.

    Raises:
        ValueError: If there is no such task.
    """
    if manager is None:
        manager = find_tasks(tasks)
    _require_tasks(manager, tasks)
    lm = HarnessModel(model, tokenizer, rows=rows, memory_size=memory_size)
    found: dict[str, Any] = simple_evaluate(
        model=lm,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    return found


def _require_tasks(manager: TaskManager, tasks: Sequence[str]) -> None:
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        msg = f"tasks must be names of lm-eval's tasks, got {unknown}. See: lm-eval ls tasks"
        raise ValueError(msg)


class _Ids:
    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = np.array(ids, dtype=np.int32)
        self.num_tokens = len(ids)

    def tokens(self, start: int, stop: int) -> Int32[np.ndarray, " token"]:
        return self._ids[start:stop]


def _batches(items: Sequence[ItemT], size: int) -> Iterator[Sequence[ItemT]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

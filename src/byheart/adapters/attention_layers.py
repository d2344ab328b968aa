"""Find the attention layers of a model, and refuse models whose attention is not ours to change."""

import inspect
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from byheart.adapters.attention_hook import (
    PLAIN,
    VIEW,
    AttentionCall,
    AttentionResult,
    Hook,
    hook_of,
    install,
    own_implementation,
    uninstall,
)
from byheart.adapters.families import attention_reach, model_kind, rotation_limit
from byheart.adapters.rotation import RotarySource, find_rotation, without_rotation
from byheart.models.eval_mode import eval_mode

# tokens of the trial that shows how a model attends
_TRIAL_TOKENS = 5
# what rounding of the angles does to the length of queries, relative; bfloat16 has 8 bits
_LENGTH_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5}
_COARSE_LENGTH = 1e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionLayers:
    """The attention layers of a model, with our function in place of theirs."""

    modules: tuple[nn.Module, ...]
    """Attention modules, in the order of the layers."""
    hooks: tuple[Hook, ...]
    """What is known of each."""
    names: tuple[str, ...]
    """Their names in the model."""
    num_heads: int
    """Query heads per layer."""
    num_kv_heads: int
    """Key-value heads per layer."""
    head_dim: int
    """Width of a head."""
    scaling: tuple[float, ...]
    """Factor of the scores, per layer."""
    has_rotation: bool
    """Whether any layer rotates; if not, positions are added to the embeddings."""
    plain_softmax: bool
    """Whether scores go into a softmax as they are: without cap and without sinks."""

    @property
    def sources(self) -> list[RotarySource]:
        """Where the angles of the layers come from, each source once."""
        rotations = [hook.rotation for hook in self.hooks]
        sources = [rotation.source for rotation in rotations if rotation is not None]
        return list(dict.fromkeys(sources))

    @property
    def take_masks(self) -> bool:
        """Whether the attention of all layers takes a mask per query and key."""
        return all(own_implementation(hook) in PLAIN for hook in self.hooks)

    def block_of(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """Return the whole layer of the model that an attention module belongs to.

        Args:
            model: The model.
            layer: Its number.

        Returns:
            The element of the model's list of layers: attention, norms and feed-forward block.
        """
        name = self.names[layer]
        while name:
            around = name.rpartition(".")[0]
            if isinstance(model.get_submodule(around), nn.ModuleList):
                block: nn.Module = model.get_submodule(name)
                return block
            name = around
        return self.modules[layer]

    def uninstall(self) -> None:
        """Give all layers their own attention function back, unless somebody else did."""
        for module, hook in zip(self.modules, self.hooks, strict=True):
            if hook_of(module) is hook:
                uninstall(module)


def find_attentions(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """List the self-attention modules of a decoder, without changing anything.

    Args:
        model: A causal language model.

    Returns:
        Names and modules, in the order of the layers.

    Raises:
        ValueError: If the model is no decoder, some layers have no attention, or one does not look
            its attention function up.
    """
    if model_kind(model) != "decoder":
        msg = f"model must be a causal language model, got {type(model).__name__}."
        raise ValueError(msg)
    family = model.config.model_type
    found = [
        (name, module)
        for name, module in model.named_modules()
        if getattr(module, "layer_idx", None) is not None and "Attention" in type(module).__name__
    ]
    closed = next((module for _, module in found if not _looks_up(module)), None)
    config = model.config.get_text_config()
    if closed is not None or not found:
        what = "its attention" if closed is None else type(closed).__name__
        msg = (
            f"Memory enters a model where it looks its attention function up, but {what} of "
            f"{family} does not do so. Use another model."
        )
        raise ValueError(msg)
    if len(found) != config.num_hidden_layers:
        msg = (
            f"Every layer must have one attention, but {family} has {len(found)} in "
            f"{config.num_hidden_layers} layers: what the others remember cannot be kept apart by "
            "document. Use another model."
        )
        raise ValueError(msg)
    if getattr(config, "attention_chunk_size", None):
        msg = f"{family} attends in chunks, which do not fit segments. Use another model."
        raise ValueError(msg)
    return found


def prepare_attentions(model: PreTrainedModel, reach: int) -> AttentionLayers:
    """Put our attention function into all layers, and find out by a trial how they attend.

    Args:
        model: A causal language model with its weights.
        reach: Most tokens that see each other: those of a segment and the XL cache.

    Returns:
        The layers; their outputs are the model's own as long as a pass carries no view.

    Raises:
        ValueError: If the model does not fit. Nothing is changed then.
    """
    found = find_attentions(model)
    with ExitStack() as undo:
        for index, (name, module) in enumerate(found):
            install(module, index, name)
            undo.callback(uninstall, module)
        try:
            layers = _examine(model, found, reach)
        except (RuntimeError, TypeError, LookupError, AttributeError) as error:
            msg = f"{model.config.model_type} failed in a trial: {error}. Use another model."
            raise ValueError(msg) from error
        undo.pop_all()
    return layers


class _Trial:
    """A view that looks on."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}
        self.arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def attend(self, call: AttentionCall) -> AttentionResult:
        if call.hook.index in self.calls:
            msg = (
                f"A layer must attend once, but {call.hook.name} does so several times. Use "
                "another model."
            )
            raise ValueError(msg)
        self.calls[call.hook.index] = call
        return call.attend(call.key, call.value, call.mask)


def _examine(
    model: PreTrainedModel, found: list[tuple[str, nn.Module]], reach: int
) -> AttentionLayers:
    trial, sources = _run_trial(model, found)
    family = model.config.model_type
    if len(trial.calls) != len(found):
        msg = f"Arguments do not reach the attention of {family}. Use another model."
        raise ValueError(msg)
    calls = [trial.calls[index] for index in range(len(found))]
    shapes = {(call.query.shape[1], call.key.shape[1], call.key.shape[3]) for call in calls}
    if len(shapes) != 1 or any(call.key.shape != call.value.shape for call in calls):
        msg = (
            f"Queries, keys and values must have one shape in all layers, but those of {family} "
            f"are of {sorted(shapes)} with values of width "
            f"{sorted({call.value.shape[3] for call in calls})}. Use another model."
        )
        raise ValueError(msg)
    for index, call in enumerate(calls):
        _find_rotation_of(call, trial, sources, family)
        call.hook.window = _window(model, call, index)
    has_rotation = any(call.hook.rotation is not None for call in calls)
    if not has_rotation and getattr(model.config.get_text_config(), "rope_parameters", None):
        msg = f"{family} rotates its keys where it cannot be seen. Use another model."
        raise ValueError(msg)
    if has_rotation:
        _require_same_lengths(model, found, trial, reach)
    num_heads, num_kv_heads, head_dim = next(iter(shapes))
    return AttentionLayers(
        modules=tuple(module for _, module in found),
        hooks=tuple(call.hook for call in calls),
        names=tuple(name for name, _ in found),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scaling=tuple(call.scaling for call in calls),
        has_rotation=has_rotation,
        plain_softmax=not any(
            call.options.get(name) is not None for call in calls for name in ("softcap", "s_aux")
        ),
    )


def _require_same_lengths(
    model: PreTrainedModel, found: list[tuple[str, nn.Module]], trial: _Trial, reach: int
) -> None:
    """Refuse a model that rotates, and scales by the place in the document besides.

    Places are counted anew in each segment, which only distances survive. A scale that begins
    behind the last place of a segment and its XL cache is not met in segments.

    Raises:
        ValueError: If queries or keys are longer at that place.
    """
    first = min(reach, rotation_limit(model) or reach) - _TRIAL_TOKENS
    if first <= 0:
        return
    moved, _ = _run_trial(model, found, first)
    for index, (_, module) in enumerate(found):
        # layer by layer: what deep layers read has been rounded otherwise further out
        name, hidden = next(iter(_bound(module, trial.arguments[index]).items()))
        calls = trial.calls[index], _again(module, moved.arguments[index], {name: hidden})
        tolerance = _LENGTH_TOLERANCE.get(calls[0].query.dtype, _COARSE_LENGTH)
        for name in ("query", "key"):
            here, there = (getattr(call, name).float().norm(dim=-1) for call in calls)
            if not bool(((here - there).abs() <= tolerance * here.max()).all()):
                msg = (
                    f"{model.config.model_type} scales its queries or keys by their place in the "
                    f"document, already within the {reach} tokens of a segment and the XL cache, "
                    "and in every segment places begin at 0 again. Use another model, or a shorter "
                    "segment_length."
                )
                raise ValueError(msg)


def _bound(module: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """Name the arguments of a call of a layer.

    Returns:
        The arguments; those that it passes on are among them.
    """
    args, kwargs = arguments
    bound = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    return {**bound, **bound.pop("kwargs", {})}


def _again(
    module: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]], changes: dict[str, Any]
) -> AttentionCall:
    """Call a layer once more, with other arguments.

    Returns:
        What reached its attention function.
    """
    seen = _Trial()
    with eval_mode(module), torch.no_grad():
        module(**{**_bound(module, arguments), **changes, VIEW: seen})
    (call,) = seen.calls.values()
    return call


def _run_trial(
    model: PreTrainedModel, found: list[tuple[str, nn.Module]], first: int = 0
) -> tuple[_Trial, dict[int, RotarySource]]:
    """Run the model once and look on.

    Args:
        model: The model.
        found: Its attention modules.
        first: Position of the first token.

    Returns:
        What was seen, and the sources of angles by the identity of their cosines.

    Raises:
        ValueError: If the model has no weights.
    """
    trial, sources, kept = _Trial(), {}, []

    def see_angles(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            kept.append(output)  # while they are kept, no other tensor has their identity
            sources[id(output[0])] = RotarySource.of_call(module, args, kwargs)

    def see_arguments(index: int) -> Any:
        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            trial.arguments[index] = (args, kwargs)

        return see

    device = model.get_input_embeddings().weight.device
    if device.type == "meta":
        msg = "The model must have its weights, got one on the meta device. Load it first."
        raise ValueError(msg)
    with ExitStack() as stack:
        for index, (_, module) in enumerate(found):
            handle = module.register_forward_pre_hook(see_arguments(index), with_kwargs=True)
            stack.callback(handle.remove)
        for module in model.modules():
            if "RotaryEmbedding" in type(module).__name__:
                handle = module.register_forward_hook(see_angles, with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        ids = torch.arange(1, 1 + _TRIAL_TOKENS, device=device)[None]
        ids %= model.get_input_embeddings().weight.shape[0]
        positions = {
            "position_ids": torch.arange(first, first + _TRIAL_TOKENS, device=device)[None]
        }
        model(input_ids=ids, use_cache=False, **(positions if first else {}), **{VIEW: trial})
    return trial, sources


def _find_rotation_of(
    call: AttentionCall, trial: _Trial, sources: dict[int, RotarySource], family: str
) -> None:
    """Write into a layer's hook how it rotates.

    Raises:
        ValueError: If that cannot be undone.
    """
    if call.angles is None:
        return
    where = f"{call.hook.name} of {family}"
    source = sources.get(id(call.angles[0])) if isinstance(call.angles, tuple) else None
    apply = getattr(sys.modules[type(call.module).__module__], "apply_rotary_pos_emb", None)
    if source is None or apply is None:
        msg = f"{where} has positions of a kind that cannot be undone. Use another model."
        raise ValueError(msg)
    changes = {"position_embeddings": without_rotation(call.angles)}
    keys: Tensor = _again(call.module, trial.arguments[call.hook.index], changes).key
    try:
        call.hook.rotation = find_rotation(apply, source, call.angles, call.key, keys)
    except ValueError as error:
        msg = f"{where} {error}. Use another model."
        raise ValueError(msg) from error


def _window(model: PreTrainedModel, call: AttentionCall, index: int) -> int | None:
    """Return how many tokens a layer sees: some say so, some only build such masks.

    Returns:
        Tokens, the own one included; `None` for all.
    """
    said: int | None = call.options.get("sliding_window")
    if said is not None:
        return said
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    slides = attention_reach(model) is not None
    if kinds is not None:
        slides = "sliding" in kinds[index]
    window: int | None = getattr(config, "sliding_window", None)
    return window if slides else None


def _looks_up(module: nn.Module) -> bool:
    """Say whether a layer looks its attention function up.

    Returns:
        Whether ours would be found.
    """
    code = inspect.unwrap(type(module).forward).__code__
    return "ALL_ATTENTION_FUNCTIONS" in code.co_names

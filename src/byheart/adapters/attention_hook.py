"""The one place where memory enters a Hugging Face model: an attention function of our own.

A layer looks its attention function up in its config, so a layer whose config is a copy that names
ours is the only one that changes. What a pass reads and writes travels as an argument from the
model's `forward` down to the function; nothing is kept in the model.
"""

import copy
import inspect
import sys
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from byheart.adapters.rotation import Angles, Rotation

NAME = "byheart"
"""Of the attention function."""
VIEW, ANGLES = "byheart_view", "byheart_angles"
"""Arguments that carry what a pass reads, and the angles of its tokens."""

PLAIN = ("sdpa", "eager")
"""Attentions whose mask is a tensor with a column for each token."""

# what models call the angles of their tokens
_ANGLES = "position_embeddings"

AttentionResult: TypeAlias = tuple[Tensor, Tensor | None]
"""Output `[batch, token, heads, head_dim]`, and weights if the model's attention returns them."""


@dataclass(eq=False)
class Hook:
    """What is known of a layer whose attention is ours. It is kept in the layer's config."""

    index: int
    """Number of the layer among the attention layers."""
    name: str
    """Name of its attention module."""
    config: Any
    """The config that the layer had."""
    angles_argument: int | None
    """Place of the angles among the positional arguments of the layer, if it takes them."""
    rotation: Rotation | None = None
    """How it rotates; `None` if it does not."""
    window: int | None = None
    """Tokens that it sees, the own one included; `None` for all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """A call of an attention layer, as the model's own function would get it."""

    module: nn.Module
    hook: Hook
    query: Tensor
    """`[batch, heads, token, head_dim]`, rotated."""
    key: Tensor
    """`[batch, kv_heads, entry, head_dim]`, rotated; with the model's own cache, all of it."""
    value: Tensor
    mask: Any
    angles: Angles | None
    """Of the tokens."""
    options: dict[str, Any]
    """Whatever else the model passes on."""

    @property
    def scaling(self) -> float:
        """Factor of the scores."""
        return float(self.options.get("scaling") or self.query.shape[3] ** -0.5)

    def attend(self, key: Tensor, value: Tensor, mask: Any) -> AttentionResult:
        """Attend with the model's own function.

        Args:
            key: Keys.
            value: Values.
            mask: Mask, of the kind that the model made.

        Returns:
            Output and weights.
        """
        function = _own_function(self.module, self.hook)
        result: AttentionResult = function(
            self.module, self.query, key, value, mask, **self.options
        )
        return result


@runtime_checkable
class View(Protocol):
    """What a pass carries to the attention function."""

    def attend(self, call: AttentionCall) -> AttentionResult:
        """Attend in its way."""
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> AttentionResult:
    """Attend as the view of the pass says; without one, as the model does.

    Returns:
        Output and weights.
    """
    hook = hook_of(module)
    assert hook is not None
    view, angles = options.pop(VIEW, None), options.pop(ANGLES, None)
    call = AttentionCall(
        module=module, hook=hook, query=query, key=key, value=value, mask=attention_mask,
        angles=angles, options=options,
    )  # fmt: skip
    if view is None:
        return call.attend(key, value, attention_mask)
    result: AttentionResult = view.attend(call)
    return result


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)


def hook_of(module: nn.Module) -> Hook | None:
    """Return what is known of a layer; `None` if its attention is the model's own."""
    hook: Hook | None = getattr(module.config, "byheart_hook", None)
    return hook


def has_hooks(model: nn.Module) -> bool:
    """Return whether the attention of any layer of a model is ours."""
    configs = (module for module in model.modules() if hasattr(module, "config"))
    return any(hook_of(module) is not None for module in configs)


def install(module: nn.Module, index: int, name: str) -> Hook:
    """Give a layer our attention function.

    Args:
        module: Its attention module.
        index: Its number.
        name: Its name.

    Returns:
        What is known of the layer.
    """
    parameters = list(inspect.signature(module.forward).parameters)
    argument = parameters.index(_ANGLES) if _ANGLES in parameters else None
    hook = Hook(index, name, module.config, argument)
    config = copy.copy(hook.config)
    config._attn_implementation_internal = NAME
    config.byheart_hook = hook
    module.config = config
    # in front of all others, and gone with `uninstall`
    config.byheart_handle = module.register_forward_pre_hook(_pass_angles_on, with_kwargs=True)
    return hook


def uninstall(module: Any) -> None:
    """Give a layer its own attention function back.

    Args:
        module: An attention module that `install` was called with.
    """
    hook, config = hook_of(module), module.config
    if hook is not None:
        config.byheart_handle.remove()
        module.config = hook.config


def own_implementation(hook: Hook) -> str:
    """Return the name of the attention function that the model has chosen."""
    return hook.config._attn_implementation or "eager"


def _own_function(module: nn.Module, hook: Hook) -> Any:
    name = own_implementation(hook)
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def _pass_angles_on(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let the attention function have the angles, which its layer uses before it calls it.

    Returns:
        The arguments with the angles; `None` for those that were given.
    """
    if kwargs.get(VIEW) is None:
        return None
    hook, angles = hook_of(module), kwargs.get(_ANGLES)
    place = None if hook is None else hook.angles_argument
    if angles is None and place is not None and len(args) > place:
        angles = args[place]
    return args, {**kwargs, ANGLES: angles}

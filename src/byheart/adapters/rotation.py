"""Undo and redo rotary positions with a family's own functions."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Angles: TypeAlias = tuple[Tensor, Tensor]
"""Cosine and sine, as a model's rotary embedding returns them."""

# relative to the largest number; bfloat16 rounds three times
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_COARSE = 5e-2


# not frozen: torch.compile takes frozen dataclasses for values and hashes their fields
@dataclass(kw_only=True, eq=False)
class RotarySource:
    """A rotary embedding of a model, and how the model calls it for some of its layers."""

    module: nn.Module
    """The rotary embedding."""
    arguments: dict[str, Any]
    """What it is called with besides hidden states and positions, such as the kind of layer."""

    @classmethod
    def of_call(
        cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "RotarySource":
        """Remember how a rotary embedding was called.

        Args:
            module: The rotary embedding.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            The source.
        """
        arguments = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        del arguments["x"], arguments["position_ids"]
        return cls(module=module, arguments=arguments)

    def angles(self, positions: Int[Tensor, "batch token"], dtype: torch.dtype) -> Angles:
        """Compute the angles of positions, which may be negative.

        Args:
            positions: Places of tokens.
            dtype: Precision of the model's hidden states.

        Returns:
            Cosine and sine.
        """
        like = torch.empty(1, dtype=dtype, device=positions.device)
        cos, sin = self.module(x=like, position_ids=positions, **self.arguments)
        return cos, sin


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """How a layer rotates its queries and keys."""

    apply: Callable[..., tuple[Tensor, Tensor]]
    """The family's `apply_rotary_pos_emb`."""
    width: int | None
    """Numbers of a head, the first so many, that the function is given; `None` for all."""
    source: RotarySource
    """Where the angles come from."""
    stretch: float
    """Factor by which the rotation makes queries and keys longer (YaRN), and `undo` shorter."""

    def rotate(
        self, x: Float[Tensor, "batch heads token head_dim"], angles: Angles
    ) -> Float[Tensor, "batch heads token head_dim"]:
        """Rotate queries or keys.

        Returns:
            The rotated vectors.
        """
        part = x[..., : self.width]
        # the function takes queries and keys: one head stands for the others
        turned = self.apply(part, part[:, :1], *angles)[0]
        return turned if self.width is None else torch.cat([turned, x[..., self.width :]], dim=-1)

    def undo(
        self, x: Float[Tensor, "batch heads token head_dim"], angles: Angles
    ) -> Float[Tensor, "batch heads token head_dim"]:
        """Rotate back.

        Returns:
            The vectors before the rotation.
        """
        cos, sin = angles
        # YaRN's angles have a length
        squared = (cos.float().square() + sin.float().square()).mean()
        back = (cos / squared).to(cos.dtype), (-sin / squared).to(sin.dtype)
        return self.rotate(x, back)


def without_rotation(angles: Angles) -> Angles:
    """Return the angles of position 0, of the same length.

    Args:
        angles: Of any positions.
    """
    cos, sin = angles
    length = (cos.float().square() + sin.float().square()).mean().sqrt()
    return torch.ones_like(cos) * length.to(cos.dtype), torch.zeros_like(sin)


def find_rotation(
    apply: Callable[..., tuple[Tensor, Tensor]],
    source: RotarySource,
    angles: Angles,
    given: Float[Tensor, "batch heads token head_dim"],
    plain: Float[Tensor, "batch heads token head_dim"],
) -> Rotation | None:
    """Find out how a layer rotates, by a trial.

    Args:
        apply: The family's function.
        source: Where the angles come from.
        angles: The angles of the trial.
        given: Keys as the layer made them with these angles.
        plain: Keys as the layer made them with the angles of position 0, whose length they have.

    Returns:
        The rotation; `None` if the layer ignores the angles.

    Raises:
        ValueError: If the layer rotates in a way that cannot be undone.
    """
    if _close(given, plain):
        return None
    widths: tuple[int | None, ...] = (None, angles[0].shape[-1], 2 * angles[0].shape[-1])
    for width in widths:
        stretch = float((angles[0].float() ** 2 + angles[1].float() ** 2).mean().sqrt())
        rotation = Rotation(apply=apply, width=width, source=source, stretch=stretch)
        if width is not None and width >= given.shape[-1]:
            continue
        try:
            undone = rotation.undo(given, angles)
            redone = rotation.rotate(undone, angles)
        except (RuntimeError, ValueError):
            continue
        # positions of the same length stretch vectors: compare what has none
        unstretched = rotation.undo(plain, without_rotation(angles))
        if _close(undone, unstretched) and _close(redone, given):
            return rotation
    msg = "rotates its keys in a way that cannot be undone"
    raise ValueError(msg)


def _close(mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape != theirs.shape:
        return False
    tolerance = _TOLERANCE.get(theirs.dtype, _COARSE)
    error = (mine.float() - theirs.float()).abs().max()
    return bool(error <= tolerance * theirs.float().abs().max().clamp(min=1e-20))

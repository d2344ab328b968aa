"""What transformers' `Trainer` asks a model with memory."""

from typing import Any

from torch import nn

__all__ = ["TrainerFace"]


class TrainerFace(nn.Module):
    """Answers what the Trainer asks its own models."""

    model: Any
    """The model inside."""

    accepts_loss_kwargs = True
    """Give `num_items_in_batch` to `forward`."""

    @property
    def config(self) -> Any:
        """The config of the model inside."""
        return self.model.config

    @property
    def loss_type(self) -> str | None:
        """The loss of the model inside: whether the first of the labels counts as predicted."""
        return "ForCausalLM" if self.is_language_model else getattr(self.model, "loss_type", None)

    @property
    def is_language_model(self) -> bool:
        """Whether each token is predicted from those before it."""
        return True

    def gradient_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """Trade time for memory in training, as the model itself does it.

        Args:
            arguments: Of the model's own method.
            options: Of the model's own method.

        Raises:
            ValueError: If the model cannot.
        """
        names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        enable = next((found for name in names if (found := getattr(self.model, name, None))), None)
        if enable is None:
            msg = f"{type(self.model).__name__} has no gradient checkpointing. Leave it off."
            raise ValueError(msg)
        enable(*arguments, **options)

    activation_checkpointing_enable = gradient_checkpointing_enable

    def _get_name(self) -> str:
        # when it smooths labels, it knows by its own models' names whether to move them by one
        return "LlamaForCausalLM" if self.is_language_model else type(self.model).__name__

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

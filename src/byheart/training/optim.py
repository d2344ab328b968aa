"""Parameter groups, optimizer and learning-rate schedule."""

from typing import Any

import torch
from torch import nn

from byheart.training.config import TrainingConfig

__all__ = ["make_optimizer", "parameter_groups", "schedule_arguments"]

_SCALARS = ("log_scale", "gate_bias", "gate_weight", "position_bias")


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Sort a decoder's parameters by how they are to be learned.

    Matrices decay. Norms and embeddings do not. The scalars of the attention (scale, position bias)
    and of the memory (gate) do not decay either, and move faster: an AdamW step is about as large
    as the rate, however far the parameter has to go.

    Args:
        model: The model.
        config: Rates and decay.

    Returns:
        Groups for a torch optimizer, those without a parameter left out; the first has the base
        rate.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    scalars, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.rpartition(".")[2] in _SCALARS:
            scalars.append(parameter)
        elif parameter.dim() < 2 or id(parameter) in embeddings:
            others.append(parameter)
        else:
            matrices.append(parameter)
    rate = config.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": rate, "weight_decay": config.weight_decay},
        {"params": others, "lr": rate, "weight_decay": 0.0},
        {"params": scalars, "lr": rate * config.gate_learning_rate_factor, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Build AdamW over the parameter groups.

    Args:
        model: The model, on the device it is trained on.
        config: Rates, decay and betas.

    Returns:
        The optimizer.
    """
    on_gpu = all(parameter.is_cuda for parameter in model.parameters())
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=config.betas,
        fused=True if on_gpu else None,
    )


def schedule_arguments(config: TrainingConfig) -> dict[str, Any]:
    """Name the schedule for `transformers.TrainingArguments`.

    Args:
        config: The schedule and its numbers.

    Returns:
        The arguments that set it.
    """
    name, options = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": config.final_rate_ratio}),
        # of power 1 it is linear, and it knows a lowest rate
        "linear": (
            "polynomial",
            {"power": 1.0, "lr_end": config.learning_rate * config.final_rate_ratio},
        ),
        "rsqrt": ("inverse_sqrt", {"timescale": config.warmup_steps}),
        "constant": ("constant_with_warmup", {}),
    }[config.schedule]
    return {
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": options,
        "warmup_steps": config.warmup_steps,
    }

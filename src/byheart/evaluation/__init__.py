"""Perplexity by memory size and by position in the document: measured, tabulated, plotted."""

from byheart.evaluation.perplexity import EvaluationProgress, evaluate_perplexity
from byheart.evaluation.plots import plot_loss_by_position, plot_perplexity, plot_training_curves
from byheart.evaluation.result import (
    Comparison,
    DocumentLoss,
    Measurement,
    PerplexityResult,
    PositionBucket,
    compare,
)
from byheart.evaluation.token_losses import TokenLossDifferences, token_loss_differences

__all__ = [
    "Comparison",
    "DocumentLoss",
    "EvaluationProgress",
    "Measurement",
    "PerplexityResult",
    "PositionBucket",
    "TokenLossDifferences",
    "compare",
    "evaluate_perplexity",
    "plot_loss_by_position",
    "plot_perplexity",
    "plot_training_curves",
    "token_loss_differences",
]

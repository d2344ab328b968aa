"""All weight initialisation in one place.

================================ =================================================================
parameter                        first value
================================ =================================================================
embedding (tied with the output) normal, 0.02
attention queries, keys, values  truncated normal, 1 / sqrt(fan-in)
attention output, contract       the same, / sqrt(2 * num_layers): keeps the residual stream small
expand                           truncated normal, 1 / sqrt(fan-in)
norms                            1
position bias, content gate      0
log scale, gate bias             from the config
================================ =================================================================

The authors use a standard-normal embedding and divide the logits by sqrt(embed_dim), which
Adafactor's relative steps make up for; with AdamW the embedding would hardly move.
"""

import math

from torch import nn

_EMBEDDING_STD = 0.02
_INTO_RESIDUAL = ("attention.output", "contract")


def initialize(model: nn.Module) -> None:
    """Give every linear layer and embedding of a decoder its first weights."""
    num_layers = len(model.get_submodule("blocks")._modules)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=_EMBEDDING_STD)
        elif isinstance(module, nn.Linear):
            std = 1 / math.sqrt(module.in_features)
            if name.endswith(_INTO_RESIDUAL):
                std /= math.sqrt(2 * num_layers)
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)

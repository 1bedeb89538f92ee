"""The deep autoencoders of the demo: hard for first-order methods because the code is far from both ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from kfac_func._errors import HyperparameterError, explain

CURVES = (784, 500, 250, 100, 30)
DIGITS = (64, 60, 50, 40, 30, 20, 10)


def autoencoder(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """Build the autoencoder sizes[0] - sizes[1] - … - sizes[-1] - … - sizes[0] with tanh between the layers.

    The code (the narrowest layer, width sizes[-1]) and the output are linear; the outputs are logits. Weights are
    Xavier-uniform from `seed`, biases zero. Raises HyperparameterError for fewer than two sizes.

    >>> model = autoencoder((6, 4, 2), seed=0)
    >>> [tuple(layer.weight.shape) for layer in model if isinstance(layer, nn.Linear)]
    [(4, 6), (2, 4), (4, 2), (6, 4)]
    >>> [type(layer).__name__ for layer in model]
    ['Linear', 'Tanh', 'Linear', 'Linear', 'Tanh', 'Linear']
    """
    if len(sizes) < 2:
        raise HyperparameterError(
            explain("an autoencoder needs an input and a code.", got=list(sizes), wanted="at least two sizes")
        )
    generator = torch.Generator().manual_seed(seed)
    widths = [*sizes, *reversed(sizes[:-1])]
    linear_outputs = {len(sizes) - 2, len(widths) - 2}
    layers: list[nn.Module] = []
    for index, (d_in, d_out) in enumerate(pairwise(widths)):
        layer = nn.Linear(d_in, d_out)
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer] if index in linear_outputs else [layer, nn.Tanh()]
    return nn.Sequential(*layers)

"""Influence functions: what the loss on one example would be, had another one not been trained on."""

from kfac_func.influence.scores import scores as scores
from kfac_func.influence.self_influence import self_influence as self_influence

"""Layer kinds: how each kind of layer reaches the waist. A new kind is a file and a line here."""

from collections.abc import Callable
from typing import Any

from kfac_func.layers import attention, broadcast, conv, conv_transpose, einsum, embedding, linear, normalization
from kfac_func.layers.base import Call as Call
from kfac_func.layers.base import Found as Found
from kfac_func.layers.base import Handler as Handler
from kfac_func.layers.base import Ref as Ref
from kfac_func.layers.base import bias as bias
from kfac_func.layers.broadcast import own_sizes as own_sizes
from kfac_func.layers.lone import unstructured as unstructured

handlers: dict[object, Handler] = {
    **linear.handlers,
    **conv.handlers,
    **conv_transpose.handlers,
    **embedding.handlers,
    **normalization.handlers,
    **einsum.handlers,
    **broadcast.handlers,
}
"""The torch functions that a kind recognises."""

expansions: dict[object, Callable[..., Any]] = {
    **attention.expansions,
    **broadcast.expansions,
    **einsum.expansions,
    **embedding.expansions,
}
"""The torch functions with several uses inside: the same function, written in calls that a kind recognises."""

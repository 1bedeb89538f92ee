"""Contractions with a raw weight: x @ W, W.T, mm, addmm, einsum, and a bias that is added right after.

Every contraction of one weight with one other operand is brought to the dense form by naming its dimensions:

    i  in the weight and the other operand, summed       o  in the weight and the result
    q  in all three (groups, e.g. heads)                  s  in the other operand and the result (examples, positions)
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from kfac_func.blocks import Part
from kfac_func.layers.base import Call, Found, Handler, Ref, dense, dense_bias, found_bias, vector_of


def _parse(equation: str, dims: tuple[int, int]) -> tuple[str, str, str] | None:
    """Letters of both operands and the result, ellipses written out; None for what is no plain contraction."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2:
        return None
    free = [c for c in ascii_letters if c not in equation]
    extra = max([0, *[n - len(t.replace("...", "")) for t, n in zip(terms, dims, strict=True) if "..." in t]])
    names = "".join(free[:extra])
    terms = [
        term.replace("...", names[extra - (n - len(term) + 3) :] if n > len(term) - 3 else "")
        for term, n in zip(terms, dims, strict=True)
    ]
    return terms[0], terms[1], right.replace("...", names)


def _contract(call: Call, x: Tensor, ref: Ref, xs: str, ws: str, out: str) -> Found | None:
    shared, summed = set(xs) & set(ws), (set(xs) | set(ws)) - set(out)
    if (
        any(len(set(term)) < len(term) for term in (xs, ws, out))
        or not summed <= shared
        or not set(out) <= set(xs + ws)
    ):
        return None
    q, i = [c for c in ws if c in shared - summed], [c for c in ws if c in summed]
    o, s = [c for c in ws if c not in xs], [c for c in xs if c not in ws]
    if ref.part and (q or len(i) != 1 or len(o) != 1):
        return None
    size = dict(zip(xs, x.shape, strict=True)) | dict(zip(ws, (ref.size[d] for d in ref.order), strict=True))
    if any(size[c] != n for c, n in zip(xs, x.shape, strict=True)):
        return None  # broadcast against a dimension of size 1
    groups = prod([size[c] for c in q])
    lead = [*(size[c] for c in s), *([groups] if groups > 1 else [])]
    result = call.run()
    there = [out.index(c) for c in (*s, *q, *o)]
    back = sorted(range(len(there)), key=there.__getitem__)
    form = [size[c] for c in (*s, *q, *o)]
    trailing = not q and out.endswith("".join(o))
    return Found(
        kind=dense._replace(name="einsum"),
        options=(groups > 1,),
        weight=ref,
        bias=None,
        inputs=x.permute([xs.index(c) for c in (*s, *q, *i)]).reshape(*lead, prod([size[c] for c in i])),
        output=result.permute(there).reshape(*lead, prod([size[c] for c in o])),
        positions=prod([size[c] for c in s]),
        order=tuple(ref.order[ws.index(c)] for c in (*q, *o, *i)),
        groups=groups,
        outputs=ref.shape[ref.order[ws.index(o[0])]] if ref.part else prod([size[c] for c in o]),
        part=Part(*(ref.place(ref.order[ws.index(c)]) for c in (*o, *i))) if ref.part else Part(),
        restore=lambda y: y.reshape(form).permute(back),
        bias_shape=tuple(size[c] for c in o) if trailing and o else None,
    )


def _operands(call: Call, left: object, right: object, ls: str, rs: str, out: str) -> Found | None:
    """Exactly one operand must be a parameter; it becomes the weight."""
    lref, rref = call.ref(left), call.ref(right)
    if lref is None and rref is not None and isinstance(left, Tensor):
        return _contract(call, left, rref, ls, rs, out)
    if rref is None and lref is not None and isinstance(right, Tensor):
        return _contract(call, right, lref, rs, ls, out)
    return None


def _einsum(call: Call) -> Found | None:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    letters = _parse(equation, (operands[0].ndim, operands[1].ndim))
    return None if letters is None else _operands(call, operands[0], operands[1], *letters)


def _product(call: Call, left: Tensor, right: Tensor) -> Found | None:
    """left @ right, with torch's rules for one and more dimensions."""
    if left.ndim == 0 or right.ndim == 0:
        return None
    batch = ascii_letters[: max(left.ndim, right.ndim, 2) - 2]
    ls = "Z" if left.ndim == 1 else batch[len(batch) - (left.ndim - 2) :] + "YZ"
    rs = "Z" if right.ndim == 1 else batch[len(batch) - (right.ndim - 2) :] + "ZX"
    out = batch + ("Y" if left.ndim > 1 else "") + ("X" if right.ndim > 1 else "")
    return _operands(call, left, right, ls, rs, out)


def _matmul(call: Call) -> Found | None:
    names = ("input", "mat2") if call.func in (torch.mm, Tensor.mm) else ("input", "other")
    return _product(call, *call.bind(*names))


def _rmatmul(call: Call) -> Found | None:
    return _product(call, call.args[1], call.args[0])


def _addmm(call: Call) -> Found | None:
    bias, left, right, beta, alpha = call.bind("input", "mat1", "mat2", "beta", "alpha", beta=1, alpha=1)
    if beta != 1 or alpha != 1:
        return None
    found = _product(call, left, right)
    own = vector_of(call, bias)
    if found is None and own is not None and call.ref(left) is None and call.ref(right) is None and len(own.shape) == 1:
        return found_bias(dense_bias, (False,), own, call.run(), -1)
    if found is None or (own is not None and own.size != found.bias_shape):
        return None
    return found._replace(bias=own, bias_shape=None)


handlers: dict[object, Handler] = {
    torch.einsum: _einsum,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _rmatmul,
}


def tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Tensor:
    """torch.tensordot as an einsum."""
    del out
    ones, twos = (range(a.ndim - dims, a.ndim), range(dims)) if isinstance(dims, int) else dims
    xs, ws = list(ascii_letters[: a.ndim]), list(ascii_letters[a.ndim : a.ndim + b.ndim])
    for one, two in zip(ones, twos, strict=True):
        ws[two] = xs[one]
    summed = {xs[one] for one in ones}
    return torch.einsum(f"{''.join(xs)},{''.join(ws)}->{''.join(c for c in xs + ws if c not in summed)}", a, b)


expansions: dict[object, Callable[..., Tensor]] = {torch.tensordot: tensordot}

"""Pieces that a tape cannot see: transforms inside the model, compiled code, casts, writing, data-dependent rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from tests.fuzz.clothes import CLOTHES, Straight, layer, layers
from tests.fuzz.draw import Draw, Maker, Params, Piece, Shape

# ------------------------------------------------------------------------------------- transforms in the model


def stacked(d: Draw, s: Shape) -> Piece:
    """vmap over stacked parameters: an ensemble in one model."""
    k, o = d.size(1, 3), d.size()
    params = {"w": d.weight(k, o, s[-1]) * k**0.5, "b": d.normal(k, o)}

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        return vmap(lambda w, b: F.linear(x, w, b).tanh())(p["w"], p["b"]).mean(0)

    return Piece(params, apply, (*s[:-1], o))


def _rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return vmap(lambda one: F.linear(one, w, b))(x)


def inner_grad(d: Draw, s: Shape) -> Piece:
    energy = lambda x, w, b: (F.linear(x, w, b).tanh() ** 2).sum()  # noqa: E731
    return layer(d, s, lambda x, w, b: grad(energy)(x, w, b))._replace(shape=s)


def by_autograd(d: Draw, s: Shape) -> Piece:
    """torch.autograd.grad inside, as gradient penalties and force fields do."""

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(F.linear(x, w, b).tanh().pow(2).sum(), x, create_graph=True)[0]

    return layer(d, s, run)._replace(shape=s)


def parameter_gradient(d: Draw, s: Shape) -> Piece:
    """A gradient step on the weight inside the model (meta learning)."""

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        w = w - 0.1 * grad(lambda v: F.linear(x, v).pow(2).mean())(w)
        return F.linear(x, w, b)

    piece = layer(d, s, run)
    return piece._replace(traits=frozenset({"mixing"}))


def _jvp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return jvp(lambda y: F.linear(y, w, b).tanh(), (x,), (0.5 * x.detach(),))[1]


def _laplacian(d: Draw, s: Shape) -> Piece:
    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return vmap(lambda one: hessian(lambda y: F.linear(y, w, b).tanh().sum())(one).diagonal())(x)

    return layer(d, s, run)._replace(shape=s)


def _jacobian(d: Draw, s: Shape) -> Piece:
    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return vmap(lambda one: jacrev(lambda y: F.linear(y, w, b).tanh())(one).sum(-1))(x)

    return layer(d, s, run)


# --------------------------------------------------------------------------------------- code that is compiled


@torch.jit.script
def _scripted(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(x, w.t()) + b


@functools.cache
def _compiled() -> Any:
    return torch.compile(_scripted_plainly, backend="eager", dynamic=True)


def _scripted_plainly(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, w, b))


class Product(torch.autograd.Function):
    """x @ wᵀ by hand, in the style of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].flatten(0, -2).mT @ x.flatten(0, -2)


def _checkpointed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return checkpoint(_scripted_plainly, x, w, b, use_reentrant=False)


def half_seen(d: Draw, s: Shape) -> Piece:
    """One use in the open, one hidden."""
    hidden = d.pick(
        lambda x, w, b: vmap(lambda one: F.linear(one, w, b))(x),
        lambda x, w, b: _scripted(x, w, b),
        lambda x, w, b: Product.apply(x, w) + b,
        lambda x, w, b: x @ w.data.mT + b,
    )
    return layer(d, s, lambda x, w, b: F.linear(x, w, b).tanh() + hidden(x, w, b))


# ------------------------------------------------------------------------------------ branches, casts, writing


def _no_grad(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        target = F.linear(x, w, b).tanh()
    return F.linear(x, w, b) * (1 + target)


def _stopped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b) + F.linear(x.tanh(), w, b).detach()


def _autocast(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, w, b)
    return y.to(x.dtype)


def _half(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).to(x.dtype)


def _added(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w).add_(b)


def _plus(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, w)
    y += b
    return y


def _zeroed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, w, b)
    y[..., 0] = 0.5
    return y.mul_(1.5)


def _overwritten(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    x = x.clone()
    y = F.linear(x, w, b)
    x.mul_(0)
    return y + x.sum(-1, keepdim=True)


def _preallocated(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:-1], len(w))
    for row in range(len(x)):
        out[row] = F.linear(x[row], w, b)
    return out


def _by_row(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.stack([F.linear(x[n], w, b) for n in range(len(x))])


def _by_sign(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b) if x.sum() > 0 else x @ w.mT - b


def _chosen(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Rows by a mask."""
    mask = x.flatten(1).sum(1) > 0
    out = torch.zeros(*x.shape[:-1], len(w), dtype=x.dtype)
    return out.index_put((mask.nonzero().squeeze(1),), F.linear(x[mask], w, b))


def _chosen_positions(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Positions by a mask, as padded tokens are left out."""
    mask = x[..., 0] > 0
    out = torch.zeros(*x.shape[:-1], len(w), dtype=x.dtype)
    return out.masked_scatter(mask.unsqueeze(-1), F.linear(x[mask], w, b))


def experts(d: Draw, s: Shape) -> Piece:
    """Every example goes to one of two experts."""
    o = d.size()
    params = {"gate": d.weight(2, s[-1]), "w": d.weight(2, o, s[-1]), "u": d.weight(o, s[-1]), "v": d.weight(o, s[-1])}
    packed = d.chance(0.4)

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores = F.linear(flat, p["gate"]).softmax(-1)
        weights = p["w"] if packed else (p["u"], p["v"])
        out = flat.new_zeros(len(flat), o)
        for k, w in enumerate(weights):
            index = (scores.argmax(-1) == k).nonzero().squeeze(1)
            out = out.index_add(0, index, F.linear(flat[index], w) * scores[index, k, None])
        return out.unflatten(0, x.shape[:-1])

    used = {k: v for k, v in params.items() if k == "gate" or (k == "w") == packed}
    return Piece(used, apply, (*s[:-1], o))


def buffer(d: Draw, s: Shape) -> Piece:
    """A running mean that the model writes, and reads."""
    mean = torch.zeros(s[-1], dtype=torch.float64)

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        mean.mul_(0.9).add_(0.1 * x.detach().reshape(-1, s[-1]).mean(0).double())
        return F.linear(x, p["w"])

    return Piece({"w": d.weight(s[-1], s[-1])}, apply, s)


def complex_weight(d: Draw, s: Shape) -> Piece:
    o = d.size()
    w = torch.complex(d.weight(o, s[-1]), d.weight(o, s[-1]))
    return Piece({"w": w}, lambda p, x, e: F.linear(x.to(p["w"].dtype), p["w"]).abs(), (*s[:-1], o))


HIDDEN: dict[str, Maker] = {
    "vmap over stacked parameters": Maker(stacked, (1, 2)),
    "vmap over rows": layers(_rows),
    "grad inside": Maker(inner_grad, (1, 2)),
    "autograd.grad inside": Maker(by_autograd, (1, 2), 0.5),
    "gradient step inside": Maker(parameter_gradient, (1, 2), 0.5),
    "jvp inside": layers(_jvp),
    "hessian inside": Maker(_laplacian, (1,), 0.5),
    "jacrev inside": Maker(_jacobian, (1,), 0.5),
    "jit": layers(_scripted),
    "compile": layers(lambda x, w, b: _compiled()(x, w, b), often=0.15),
    "custom Function": layers(lambda x, w, b: Product.apply(x, w) + b),
    "custom Function of x": layers(lambda x, w, b: Straight.apply(F.linear(x, w, b)), often=0.5),
    "checkpoint": layers(_checkpointed),
    "half seen": Maker(half_seen, (1, 2), 1.5),
    **CLOTHES,
    "no_grad branch": layers(_no_grad),
    "detached branch": layers(_stopped),
    "autocast inside": Maker(lambda d, s: layer(d, s, _autocast)._replace(traits=frozenset({"rough"})), (1, 2), 0.7),
    "half inside": Maker(lambda d, s: layer(d, s, _half)._replace(traits=frozenset({"rough"})), (1, 2), 0.5),
    "add_ of the bias": layers(_added, often=0.5),
    "+= of the bias": layers(_plus, often=0.5),
    "result written": layers(_zeroed),
    "input written": layers(_overwritten),
    "rows written": layers(_preallocated, often=0.5),
    "loop over rows": layers(_by_row, often=0.5),
    "branch by value": layers(_by_sign, often=0.5),
    "rows by a mask": layers(_chosen),
    "positions by a mask": layers(_chosen_positions, (2,)),
    "experts": Maker(experts, (1, 2)),
    "buffer written": Maker(buffer, (1, 2), 0.5),
    "complex weight": Maker(complex_weight, (1, 2), 0.3),
}

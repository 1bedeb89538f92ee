"""The contract of every loss: one table of rows, each compared with torch.nn.functional and autograd in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from kfac_func.losses import Loss, bce_with_logits, cross_entropy, mse

# forward mode loads torch's own decompositions, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
IGNORED = 2
REDUCTIONS = ("mean", "sum", "batchmean")


class Row(NamedTuple):
    """A constructor with options, torch's own function for the same options, and data to try it on."""

    make: Callable[..., Loss]
    torch_loss: Callable[..., Tensor]
    options: dict[str, Any]
    shape: tuple[int, ...]
    kind: str
    loss: Loss

    @property
    def class_dim(self) -> int:
        return self.options.get("class_dim", 1)

    def label(self) -> str:
        options = [f"{k}={'w' if isinstance(v, Tensor) else v}" for k, v in self.options.items()]
        return "-".join([self.torch_loss.__name__, *options, "x".join(map(str, self.shape)), self.kind])

    def data(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(len(self.shape))
        z = torch.randn(self.shape, generator=g, dtype=torch.float64)
        if self.kind in ("index", "ignored"):
            classes = self.shape[self.class_dim]
            terms = z.select(self.class_dim, 0).shape
            y = torch.arange(math.prod(terms)).reshape(terms).add(1) % classes
            return z, y if self.kind == "index" else y.masked_fill(y == IGNORED, self.options["ignore_index"])
        y = torch.rand(self.shape, generator=g, dtype=torch.float64)
        if self.kind == "probabilities":
            return z, y / y.sum(self.class_dim, keepdim=True)
        return z, {"soft": y, "binary": (y > 0.5).double(), "real": 3 * y}[self.kind]

    @property
    def divisor(self) -> int:
        """l_n is this many times example n's part of the value."""
        return 1 if self.options["reduction"] == "sum" else self.shape[0]

    def noise(self) -> Tensor:
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def reference(self, z: Tensor, y: Tensor) -> Tensor:
        """The value by torch.nn.functional."""
        options = {k: v for k, v in self.options.items() if k not in ("class_dim", "scale", "reduction")}
        reduction, classes = self.options["reduction"], self.class_dim
        if classes != 1:
            z, y = z.movedim(classes, 1), y.movedim(classes, 1) if y.dim() == z.dim() else y
        total = self.torch_loss(z, y, reduction="sum" if reduction == "batchmean" else reduction, **options)
        return self.options.get("scale", 1.0) * total / (len(z) if reduction == "batchmean" else 1)


def _cross_entropy_rows() -> list[Row]:
    w = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
    every = itertools.product((None, w), (0.0, 0.3), ("index", "ignored", "probabilities"))
    cases = [(weight, smoothing, kind, (3, 4, 2), 1) for weight, smoothing, kind in every]
    shapes = [((4, 4), 1), ((3, 2, 4), -1), ((2, 4, 1, 2), 1), ((2, 1, 4, 2), 2)]
    cases += [(w, 0.3, kind, *at) for at in shapes for kind in ("index", "ignored", "probabilities")]
    cases += [(w, 1.0, "ignored", (4, 4), 1)]
    rows = []
    for reduction, (weight, smoothing, kind, shape, class_dim) in itertools.product(REDUCTIONS, cases):
        options = {"reduction": reduction, "weight": weight, "label_smoothing": smoothing, "class_dim": class_dim}
        options |= {"ignore_index": -7} if kind == "ignored" else {}
        rows.append(Row(cross_entropy, F.cross_entropy, options, shape, kind, cross_entropy(**options)))
    return rows


def _diagonal_rows() -> list[Row]:
    rows = []
    for reduction in REDUCTIONS:
        for scale, shape in [(1.0, (4, 3)), (0.5, (4, 3)), (2.0, (2, 3, 2)), (0.5, (5,))]:
            options = {"reduction": reduction, "scale": scale}
            rows.append(Row(mse, F.mse_loss, options, shape, "real", mse(**options)))
        for w, p, shape, kind in [
            (None, None, (4, 3), "binary"),
            ((4, 1), None, (4, 3), "soft"),
            (None, (3,), (4, 3), "soft"),
            ((2,), (3, 1), (2, 3, 2), "binary"),
            ((5,), (), (5,), "soft"),
        ]:
            weight = None if w is None else torch.linspace(0.5, 2, math.prod(w), dtype=torch.float64).reshape(w)
            positive = None if p is None else torch.linspace(3, 0.3, math.prod(p), dtype=torch.float64).reshape(p)
            options = {"reduction": reduction, "weight": weight, "pos_weight": positive}
            loss = bce_with_logits(**options)
            rows.append(Row(bce_with_logits, F.binary_cross_entropy_with_logits, options, shape, kind, loss))
    return rows


ROWS = _cross_entropy_rows() + _diagonal_rows()
EACH = pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row.label()}" for i, row in enumerate(ROWS)])
FEW = [ROWS[i] for i in (1, 10, 11, 16, *range(len(ROWS) - 9, len(ROWS)))]
SOME = pytest.mark.parametrize("row", FEW, ids=[row.label() for row in FEW])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def second_moment(vectors: Tensor, probability: Tensor) -> Tensor:
    """E[c_n c_nᵀ] for vectors [K, N, *out] that have probabilities [K, N]."""
    flat = vectors.flatten(2) if vectors.dim() > 2 else vectors.unsqueeze(-1)
    return torch.einsum("kn,kni,knj->nij", probability, flat, flat)


def sign_vectors(count: int) -> Tensor:
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=count)), dtype=torch.float64)


def all_draws(row: Row, z: Tensor) -> tuple[Tensor, Tensor]:
    """Every possible draw [K, *noise_shape] with its probability [K, N]; for a Gaussian, one with its two moments."""
    shape = row.loss.noise_shape(z)
    terms = math.prod(shape[1:])
    if row.make is mse:
        step = sign_vectors(terms).reshape(-1, 1, *shape[1:]) / math.sqrt(2 * row.options["scale"])
        return z + step, torch.full((len(step), len(z)), 1 / len(step), dtype=z.dtype)
    if row.make is bce_with_logits:
        y = (sign_vectors(terms) > 0).double().reshape(-1, 1, *shape[1:]).expand(-1, *shape)
        p = z.sigmoid()
        return y, (y * p + (1 - y) * (1 - p)).flatten(2).prod(2) if z.dim() > 1 else y * p + (1 - y) * (1 - p)
    p = z.movedim(row.class_dim, -1).softmax(-1)
    y = torch.tensor(list(itertools.product(range(p.shape[-1]), repeat=terms)))
    y = y.reshape(-1, 1, *shape[1:]).expand(-1, *shape)
    picked = p.expand(len(y), *p.shape).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return y, picked.reshape(*picked.shape[:2], -1).prod(2)


@EACH
def test_value_and_score_are_torchs(row: Row) -> None:
    z, y = row.data()
    z.requires_grad_()
    reference = row.reference(z, y)
    (gradient,) = torch.autograd.grad(reference, z)
    assert gradient.abs().amin() > 0 or row.kind == "ignored", "a dead gradient proves nothing"
    close(row.loss.value(z, y), reference, 1e-14)
    close(row.loss.score(z.detach(), y), row.divisor * gradient)


@EACH
def test_hessian_is_autograds(row: Row) -> None:
    z, y = row.data()
    size = z[0].numel()
    dense = hessian(row.reference)(z, y).reshape(len(z), size, len(z), size)
    blocks = torch.stack([dense[n, :, n] for n in range(len(z))])
    close(row.loss.hessian(z, y), row.divisor * blocks)
    close(torch.block_diag(*blocks), dense.reshape(len(z) * size, -1))
    assert blocks.abs().max() > 1e-3


@EACH
def test_factor_is_a_square_root_of_the_hessian(row: Row) -> None:
    z, y = row.data()
    factor, size = row.loss.factor(z, y), row.loss.columns(z)
    assert factor.shape == (size, *z.shape) == (z[0].numel(), *z.shape)
    close(second_moment(factor, torch.ones(size, len(z), dtype=z.dtype)), row.loss.hessian(z, y))
    close(torch.cat([row.loss.factor(z, y, range(size)[i : i + 2]) for i in range(0, size, 2)]), factor, 0)
    for backwards in (torch.arange(size).flip(0), range(size - 1, -1, -1)):
        close(row.loss.factor(z, y, backwards), factor.flip(0), 0)
    touched = factor.ne(0).any(row.class_dim % z.dim() + 1) if row.make is cross_entropy else factor.ne(0)
    assert touched.reshape(size, len(z), -1).sum(2).max() == 1, "a column left its position"


@EACH
def test_sampled_score_has_the_hessian_as_second_moment(row: Row) -> None:
    z, y = row.data()
    drawn, probability = all_draws(row, z)
    close(probability.sum(0), torch.ones(len(z), dtype=z.dtype))
    scores = vmap(lambda one: row.loss.sampled_score(z, y, one))(drawn)
    close(second_moment(scores, probability), row.loss.hessian(z, y))
    close((probability.reshape(*probability.shape, *[1] * (z.dim() - 1)) * scores).sum(0), torch.zeros_like(z))


@EACH
def test_signs_have_the_hessian_as_second_moment(row: Row) -> None:
    z, y = row.data()
    epsilon = sign_vectors(z[0].numel()).reshape(-1, 1, *z.shape[1:]).expand(-1, *z.shape)
    vectors = vmap(lambda noise: row.loss.signs(z, y, noise))(0.5 + 0.25 * epsilon)
    uniform = torch.full((len(epsilon), len(z)), 1 / len(epsilon), dtype=z.dtype)
    close(second_moment(vectors, uniform), row.loss.hessian(z, y))
    expected = torch.einsum("kn...,bnk->bn...", row.loss.factor(z, y), epsilon[:8].reshape(-1, len(z), z[0].numel()))
    close(vectors[:8], expected)


@EACH
def test_product_is_the_hessian_and_the_derivative_of_the_score_and_root_combines_columns(row: Row) -> None:
    z, y = row.data()
    v = torch.linspace(-1, 2, z.numel(), dtype=z.dtype).reshape(z.shape)
    ours = row.loss.product(z, y, v)
    close(ours, torch.einsum("nij,nj->ni", row.loss.hessian(z, y), v.reshape(len(z), -1)).reshape(z.shape))
    close(ours, jvp(lambda x: row.loss.score(x, y), (z,), (v,))[1])
    close(row.loss.root(z, y, v), torch.einsum("kn...,nk->n...", row.loss.factor(z, y), v.reshape(len(z), -1)))


@EACH
def test_draws_have_the_models_frequencies(row: Row) -> None:
    z, y = row.data()
    size, count = row.loss.noise_shape(z), 1000
    grid = (torch.arange(count, dtype=z.dtype) + 0.5) / count
    noise = grid.reshape(-1, *[1] * len(size)).expand(-1, *size)
    drawn = vmap(lambda one: row.loss.sample(z, y, one))(noise)
    assert drawn.shape == noise.shape
    if row.make is mse:
        close(torch.distributions.Normal(z, (2 * row.options["scale"]) ** -0.5).cdf(drawn), noise.clone())
    elif row.make is bce_with_logits:
        close(drawn.mean(0), z.sigmoid(), 1 / count)
    else:
        counted = F.one_hot(drawn, z.shape[row.class_dim]).double().mean(0)
        close(counted.movedim(-1, row.class_dim), z.softmax(row.class_dim), 1.1 / count)


@pytest.mark.parametrize("row", [row for row in ROWS if row.options["reduction"] == "mean"], ids=Row.label)
def test_reductions_differ_by_their_divisor_only(row: Row) -> None:
    z, y = row.data()
    mean, total, batch = (row.make(**row.options | {"reduction": name}) for name in REDUCTIONS)
    close(batch.value(z, y) * len(z), total.value(z, y))
    ratio = len(z) * mean.value(z, y) / total.value(z, y)
    for name in ("score", "hessian"):
        a, b, c = (getattr(loss, name)(z, y) for loss in (mean, total, batch))
        close(b, c)
        close(a, ratio * b)


def all_functions(loss: Loss, z: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Every function of the protocol on one batch; noise has the shape of z."""
    short = noise.reshape(-1)[: math.prod(loss.noise_shape(z))].reshape(loss.noise_shape(z))
    drawn = loss.sample(z, y, short)
    return {
        **{name: getattr(loss, name)(z, y) for name in ("value", "score", "factor", "hessian")},
        "sample": drawn,
        "sampled_score": loss.sampled_score(z, y, drawn),
        "chunk": loss.factor(z, y, range(1)),
        "signs": loss.signs(z, y, noise),
        "root": loss.root(z, y, noise),
        "product": loss.product(z, y, noise),
    }


@EACH
def test_vmap_is_a_loop_and_nothing_is_mutated(row: Row) -> None:
    (z, y), noise, loss = row.data(), row.noise(), row.loss
    zs, ys, noises = torch.stack([z, z.flip(0)]), torch.stack([y, y.flip(0)]), torch.stack([noise, noise.flip(0)])
    inputs = [zs, ys, noises, *(w for w in row.options.values() if isinstance(w, Tensor))]
    kept = [t.clone() for t in inputs]
    for dims in [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)]:
        args = [a if d == 0 else a[0] for a, d in zip((zs, ys, noises), dims, strict=True)]
        mapped = vmap(lambda z, y, noise: all_functions(loss, z, y, noise), in_dims=dims)(*args)
        for i in range(2):
            one = [a[i] if d == 0 else a for a, d in zip(args, dims, strict=True)]
            for name, expected in all_functions(loss, one[0], one[1], one[2]).items():
                close(mapped[name][i], expected)
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs, strict=True))


@EACH
def test_no_value_is_read(row: Row) -> None:
    """Tensors without values go through everything, so nothing waits for a device."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        z, y = (mode.from_tensor(t) for t in row.data())
        results = all_functions(row.loss, z, y, z)
    assert all(isinstance(result, FakeTensor) for result in results.values())


@SOME
def test_make_fx_traces_everything(row: Row) -> None:
    (z, y), noise, loss = row.data(), row.noise(), row.loss
    traced = make_fx(lambda z, y, noise: all_functions(loss, z, y, noise))(z, y, noise)
    for name, result in all_functions(loss, z.flip(0), y.flip(0), noise).items():
        close(traced(z.flip(0), y.flip(0), noise)[name], result)


@pytest.mark.compile
@SOME
def test_compiles_in_one_graph(row: Row) -> None:
    (z, y), noise, loss = row.data(), row.noise(), row.loss
    torch.compiler.reset()
    compiled = torch.compile(lambda z, y, noise: all_functions(loss, z, y, noise), fullgraph=True, backend="aot_eager")
    for name, result in all_functions(loss, z, y, noise).items():
        close(compiled(z, y, noise)[name], result)

"""Products with the Hessian, the Gauss-Newton matrix and the Fisher against matrices written out."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap

import kfac_func as kf
from tests import oracles
from tests.zoo import CASES, Case, close, curvature_of, functional, randn

names = pytest.mark.parametrize("name", CASES)
SMALL = ("mlp", "bernoulli", "recurrent", "attention", "tied")
SUM = {"cross_entropy": kf.losses.cross_entropy(reduction="sum"), "mse": kf.losses.mse(reduction="sum")}


def total(case: Case) -> int:
    return sum(leaf.numel() for leaf in oracles.flat(case.params).values())


def flat(tree) -> Tensor:
    """All leaves in the order of their paths."""
    return torch.cat([leaf.flatten() for _, leaf in sorted(oracles.flat(tree).items())])


def unflat(case: Case, vector: Tensor):
    leaves = dict(sorted(oracles.flat(case.params).items()))
    parts = vector.split([leaf.numel() for leaf in leaves.values()])
    return oracles.nested(
        case.params, {p: x.reshape(leaf.shape) for x, (p, leaf) in zip(parts, leaves.items(), strict=True)}
    )


def dense(case: Case, product) -> Tensor:
    """The matrix of a product: one vmap over the unit vectors."""
    return vmap(lambda e: flat(product(unflat(case, e))))(torch.eye(total(case), dtype=torch.float64)).mT


@cache
def hessian_of(name: str) -> Tensor:
    case = CASES[name]

    def value(vector: Tensor) -> Tensor:
        return case.value(case.fn(unflat(case, vector), case.inputs), case.targets)

    # jacrev of jacrev is not symmetric for layer norms in torch 2.13; this is one row after the other
    return torch.autograd.functional.hessian(value, flat(case.params))  # pyright: ignore[reportReturnType]


def own_gradients(case: Case) -> Tensor:
    """[N, P]"""
    rows = oracles.example_gradients(case.fn, case.params, case.inputs, case.targets, case.value)
    return torch.cat([rows[path].flatten(1) for path in sorted(rows)], dim=1)


@names
def test_the_gauss_newton_matrix(name):
    case = CASES[name]
    product = kf.products.ggn_vp(case.fn, case.loss)(case.params, case.batch)
    assert close(dense(case, product), curvature_of(name).whole(sorted(oracles.flat(case.params))))


@names
def test_the_hessian(name):
    case = CASES[name]
    assert close(dense(case, kf.products.hvp(case.fn, case.loss)(case.params, case.batch)), hessian_of(name))


@names
def test_the_empirical_fisher(name):
    case = CASES[name]
    product = kf.products.fisher_vp(case.fn, case.loss, kf.estimators.empirical())(case.params, case.batch)
    rows = own_gradients(case)
    assert close(dense(case, product), rows.T @ rows / len(rows))


@names
def test_a_drawn_fisher_is_that_of_its_vectors(name, generator):
    case = CASES[name]
    z, j = case.fn(case.params, case.inputs), curvature_of(name).jacobian
    j = torch.cat([j[path].flatten(2) for path in sorted(j)], dim=-1)
    for estimator in (kf.estimators.monte_carlo(2), kf.estimators.curvature_prop(3)):
        shape = estimator.noise(case.loss, z)
        assert shape is not None
        noise = torch.rand(shape, generator=generator, dtype=torch.float64)
        c = torch.cat(list(estimator.vectors(case.loss, z, case.targets, noise))).flatten(2)
        rows = torch.einsum("vnd,ndp->vnp", c, j).flatten(0, 1)
        product = kf.products.fisher_vp(case.fn, case.loss, estimator)(case.params, case.batch, noise=noise)
        assert close(dense(case, product), rows.T @ rows / len(z))


@pytest.mark.parametrize("name", SMALL)
def test_all_columns_are_the_exact_fisher(name):
    case = CASES[name]
    columns = kf.estimators.exact(chunk_size=2)._replace(whole=False)
    wanted = curvature_of(name).whole(sorted(oracles.flat(case.params)))
    assert close(dense(case, kf.products.fisher_vp(case.fn, case.loss, columns)(case.params, case.batch)), wanted)
    assert close(dense(case, kf.products.fisher_vp(case.fn, case.loss)(case.params, case.batch)), wanted)


def test_draws_are_fixed_and_belong_to_the_seed():
    case = CASES["mlp"]
    made = kf.products.fisher_vp(case.fn, case.loss, kf.estimators.monte_carlo())
    one, same, other = (
        made(case.params, case.batch, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    first = flat(one(case.params))
    assert torch.equal(first, flat(one(case.params)))
    assert torch.equal(first, flat(same(case.params)))
    assert not close(first, flat(other(case.params)), 1e-2)


@pytest.mark.parametrize("kind", ["mean", "batchmean"])
@pytest.mark.parametrize(
    "estimator", [kf.estimators.exact(), kf.estimators.empirical(), kf.estimators.monte_carlo()], ids=lambda e: e.name
)
def test_a_sum_is_n_times_a_mean(estimator, kind):
    """mse over 2 outputs: "mean" has their 1/2 as well."""
    case = CASES["mean_square"]
    n, products = len(case.inputs), {}
    noise = torch.full((1, n, 2), 0.3, dtype=torch.float64) if estimator.name == "monte_carlo" else None
    for reduction in (kind, "sum"):
        loss = kf.losses.mse(reduction=reduction)
        made = kf.products.fisher_vp(case.fn, loss, estimator)
        products[reduction] = flat(made(case.params, case.batch, noise=noise)(case.params))
    per_output = {"exact": 2, "monte_carlo": 2, "empirical": 4}[estimator.name] if kind == "mean" else 1
    assert close(products["sum"], n * per_output * products[kind])


def test_a_sum_is_the_hessian_of_the_sum():
    case = CASES["mlp"]
    product = kf.products.hvp(case.fn, SUM["cross_entropy"])(case.params, case.batch)
    assert close(dense(case, product), len(case.targets) * hessian_of("mlp"))


@names
def test_a_factor_squares_to_the_matrix(name):
    case = CASES[name]
    factor = kf.products.ggn_factor(case.fn, case.loss)(case.params, case.batch)
    z = case.fn(case.params, case.inputs)
    columns = vmap(lambda u: flat(factor.times(u.reshape(z.shape))))(torch.eye(z.numel(), dtype=torch.float64)).mT
    assert close(columns @ columns.T, curvature_of(name).whole(sorted(oracles.flat(case.params))))
    rows = vmap(lambda e: factor.transposed(unflat(case, e)).flatten())(torch.eye(total(case), dtype=torch.float64))
    assert close(rows, columns)


def forward_forms(case: Case, u, v) -> dict:
    """θ ↦ uᵀHv and uᵀGv by forward derivatives alone."""

    def along(fn, tangent):
        return lambda p: jvp(fn, (p,), (tangent,))[1]

    def outputs(params) -> Tensor:
        return case.fn(params, case.inputs)

    def gauss_newton(params) -> Tensor:
        products = case.loss.product(outputs(params), case.targets, along(outputs, v)(params))
        return (along(outputs, u)(params) * products).sum() / len(case.targets)

    return {"hvp": along(along(lambda p: case.value(outputs(p), case.targets), v), u), "ggn_vp": gauss_newton}


@pytest.mark.parametrize("make", [kf.products.hvp, kf.products.ggn_vp], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", SMALL)
def test_derivatives_flow_through_products(make, name):
    case = CASES[name]
    u, v = (unflat(case, randn(total(case), seed=seed)) for seed in (3, 4))
    got = grad(lambda p: flat(u) @ flat(make(case.fn, case.loss)(p, case.batch)(v)))(case.params)
    assert close(flat(got), flat(grad(forward_forms(case, u, v)[make.__name__])(case.params)))


def test_stacked_parameters_are_members():
    case = CASES["mlp"]
    many = {k: {c: torch.stack([x, 2 * x]) for c, x in layer.items()} for k, layer in case.params.items()}
    together = vmap(lambda p: kf.products.ggn_vp(case.fn, case.loss)(p, case.batch)(case.params))(many)
    for k, factor in enumerate((1, 2)):
        params = unflat(case, factor * flat(case.params))
        alone = kf.products.ggn_vp(case.fn, case.loss)(params, case.batch)(case.params)
        assert close(flat(unflat(case, vmap(flat)(together)[k])), flat(alone))


def test_no_product_runs_the_model_again(generator):
    case, runs = CASES["mlp"], []

    def counted(params, x):
        runs.append(len(x))
        return case.fn(params, x)

    sampled = kf.products.fisher_vp(counted, case.loss, kf.estimators.monte_carlo())
    made = {
        "hvp": kf.products.hvp(counted, case.loss),
        "ggn": kf.products.ggn_vp(counted, case.loss),
        "fisher": lambda p, b: sampled(p, b, generator=generator),
        "jvp": lambda p, b: kf.products.jvp(counted)(p, b[0]),
    }
    for name, make in made.items():
        runs.clear()
        product = make(case.params, case.batch)
        assert runs == [8], name
        for _ in range(3):
            product(case.params)
        vmap(lambda e, product=product: product(unflat(case, e)))(torch.eye(total(case), dtype=torch.float64))
        assert runs == [8], name
    factor = kf.products.ggn_factor(counted, case.loss)(case.params, case.batch)
    runs.clear()
    factor.times(factor.transposed(case.params))
    assert runs == []


def test_a_leaf_that_is_not_used_and_one_that_is_none():
    case = CASES["mlp"]
    fn = lambda p, x: case.fn({k: p[k] for k in case.params}, x)  # noqa: E731
    params = {**case.params, "idle": torch.ones(2, dtype=torch.float64), "none": None}
    v = {"first": {"w": None, "b": case.params["first"]["b"]}, "second": {"w": None, "b": None}}
    zero = unflat(case, torch.zeros(total(case), dtype=torch.float64))
    full = {**zero, "first": {**zero["first"], "b": case.params["first"]["b"]}}
    for make in (kf.products.hvp, kf.products.ggn_vp):
        got = make(fn, case.loss)(params, case.batch)({**v, "idle": params["idle"], "none": None})
        wanted = make(case.fn, case.loss)(case.params, case.batch)(full)
        assert got["none"] is None
        assert torch.equal(got["idle"], torch.zeros(2, dtype=torch.float64))
        assert all(close(got[k][c], wanted[k][c]) for k in wanted for c in "wb")


def test_the_padding_row_of_an_embedding_is_a_constant():
    """Its gradient never moves: its row and its column of the Hessian are zero, so H is symmetric."""
    layers = nn.Sequential(nn.Embedding(4, 3, padding_idx=1), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)).double()
    fn, params = kf.make_functional(layers)
    batch = (torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.tensor([0, 1, 1]))
    v = {path: torch.randn_like(leaf) for path, leaf in params.items()}
    loss, free = kf.losses.cross_entropy(), v | {"0.weight": v["0.weight"].index_fill(0, torch.tensor(1), 0.0)}
    value = torch.func.grad(lambda p: loss.value(fn(p, batch[0]), batch[1]))
    want = torch.func.jvp(value, (params,), (free,))[1]

    got = kf.products.hvp(fn, loss)(params, batch)(v)

    for path, leaf in want.items():
        close(got[path], leaf)
    assert v["0.weight"][1].any()
    assert not got["0.weight"][1].any()


def test_products_have_the_dtypes_of_the_parameters():
    fn = lambda p, x: x @ p["weight"] + p["bias"].double()  # noqa: E731
    params = {"weight": randn(3, 2), "bias": randn(2).float()}
    product = kf.products.ggn_vp(fn, kf.losses.mse())(params, (randn(4, 3), randn(4, 2)))
    got = product({k: x.to(torch.float16) for k, x in params.items()})
    assert {k: x.dtype for k, x in got.items()} == {"weight": torch.float64, "bias": torch.float32}


@pytest.mark.parametrize("estimator", [None, kf.estimators.monte_carlo(2)], ids=["exact", "monte_carlo"])
def test_outputs_without_further_dimensions(estimator):
    fn, loss = lambda p, x: (x @ p["w"]).tanh(), kf.losses.mse()
    params, batch = {"w": randn(3)}, (randn(5, 3, seed=1), randn(5, seed=2))
    j = jacrev(lambda p: fn(p, batch[0]))(params)["w"]
    noise, squares = None, torch.full((5,), 2.0, dtype=torch.float64)
    if estimator is not None:
        noise = torch.linspace(0.1, 0.8, 10, dtype=torch.float64).reshape(2, 5)
        squares = sum(c[0].square() for c in estimator.vectors(loss, fn(params, batch[0]), batch[1], noise))
    product = kf.products.fisher_vp(fn, loss, estimator)(params, batch, noise=noise)
    assert close(product(params)["w"], j.T @ (squares * (j @ params["w"])) / 5)


def test_attention_in_its_fused_form():
    module = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    fn, params = functional(module, 0.4)
    batch = randn(3, 5, 4), randn(3, 5, 4, seed=1)
    loss, v = kf.losses.mse(), {k: randn(*x.shape, seed=7) for k, x in params.items()}
    gradient = lambda p: grad(lambda q: F.mse_loss(fn(q, batch[0]), batch[1]))(p)  # noqa: E731
    step = 1e-5
    ahead, behind = (gradient({k: x + sign * step * v[k] for k, x in params.items()}) for sign in (1, -1))
    got = kf.products.hvp(fn, loss)(params, batch)(v)
    assert all(close(got[k], (ahead[k] - behind[k]) / (2 * step), 1e-5) for k in params)

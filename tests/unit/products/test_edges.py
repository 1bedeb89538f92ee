"""Numbers at the edge: norms of zero, squares of halves, parameters without a dimension, norms with a shift alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func import errors
from tests import oracles
from tests.unit.products.test_refusals import LOSS, PARAMS, P, X, Y, function, functions, leaves
from tests.zoo import CASES, close
from tests.zoo.cases import randn


@pytest.mark.parametrize("by_block", [False, True])
def test_the_gradient_of_a_norm_is_zero_where_the_norm_is(by_block):
    case = CASES["mlp"]
    targets = case.targets.clone()
    targets[0] = -100
    norms: Any = P.per_example_norms(case.fn, kf.losses.cross_entropy(), by_block=by_block)

    def total(p: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        return sum(norm.square().sum() + norm.sum() for norm in leaves(norms(p, (inputs, targets))))  # pyright: ignore[reportReturnType]

    count = int((targets >= 0).sum()) / len(targets)
    found = oracles.flat(torch.func.grad(total)(case.params, case.inputs, targets))
    assert all(bool(leaf.isfinite().all()) for leaf in found.values())

    def rest(p: Any) -> Tensor:  # the same examples, each divided by all that count
        many = leaves(norms(p, (case.inputs[1:], targets[1:])))
        return sum((norm / count).square().sum() + (norm / count).sum() for norm in many)  # pyright: ignore[reportReturnType]

    wanted = oracles.flat(torch.func.grad(rest)(case.params))
    assert all(close(found[path], wanted[path]) for path in wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("route", ["tape", "vmap", "loop"])
def test_squares_of_halves_do_not_underflow(dtype, route):
    x, params = (1e-3 * X).to(dtype), {path: leaf.to(dtype) for path, leaf in PARAMS.items()}
    fn = lambda p, x: F.linear(F.linear(x, p["w"]), p["v"])  # noqa: E731
    targets, loss = torch.zeros(6, 3, dtype=dtype), kf.losses.mse("batchmean", scale=0.5)
    made = P.fisher_diagonal(fn, loss, route=route)
    found = made(params, (x, targets))
    wanted = made({path: leaf.double() for path, leaf in params.items()}, (x.double(), targets.double()))
    for path in PARAMS:
        assert found[path].dtype == torch.float32
        assert torch.allclose(found[path].double(), wanted[path], rtol=0.1, atol=0.01 * float(wanted[path].max()))
    assert float(wanted["v"].max()) < 1e-4


@pytest.mark.parametrize("route", ["auto", "vmap", "loop"])
@pytest.mark.filterwarnings("ignore::kfac_func._errors.KFacWarning")
def test_parameters_without_a_dimension(route):
    params = {**PARAMS, "gain": torch.tensor(1.3, dtype=torch.float64)}
    fn = lambda p, x: F.linear(torch.tanh(F.linear(x, p["w"]) * p["gain"]), p["v"])  # noqa: E731
    wanted = oracles.example_gradients(fn, params, X, Y, F.cross_entropy)
    found = P.per_example_grads(fn, LOSS, route=route)(params, (X, Y))
    assert found["gain"].shape == (6,)
    assert all(close(found[path], wanted[path]) for path in params)
    diagonal = P.fisher_diagonal(fn, LOSS, kf.estimators.empirical(), route=route)(params, (X, Y))
    assert close(diagonal["gain"], wanted["gain"].square().mean())


def test_a_kernel_under_autocast_is_as_exact_as_its_rows():
    def fn(p: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(torch.relu(F.linear(x, p["w"])), p["v"]).float()

    params, x = {path: leaf.float() for path, leaf in PARAMS.items()}, X.float()
    grads = P.jacobian(fn)(params, x)
    rows = torch.cat([leaf.flatten(2) for leaf in grads.values()], dim=2).double()
    for kernel in (P.empirical_ntk(fn, "trace")(params, x), under(lambda: P.empirical_ntk(fn, "trace")(params, x))):
        wanted = torch.einsum("ndp,mdp->nm", rows, rows)
        assert float((kernel.double() - wanted).norm() / wanted.norm()) < 1e-6


def under(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


@pytest.mark.parametrize("route", ["vmap", "loop", "auto"])
@pytest.mark.filterwarnings("ignore::kfac_func._errors.KFacWarning")
def test_a_vmap_that_torch_gets_wrong_is_not_taken(route):
    """prelu goes wrong in two vmaps: over examples and over output vectors."""
    params = {**PARAMS, "slope": randn(1, seed=9)}
    fn = lambda p, x: F.linear(F.prelu(F.linear(x, p["w"]), p["slope"]), p["v"])  # noqa: E731
    if route == "vmap":
        with pytest.raises(errors.CaptureError, match="route='loop'"):
            P.jacobian(fn, route=route)(params, X)
        return
    wanted = oracles.jacobians(fn, params, X, 6)
    found = P.jacobian(fn, route=route)(params, X)
    assert all(close(found[path].flatten(2), wanted[path].flatten(2)) for path in params)


@function
@pytest.mark.parametrize("route", ["auto", "vmap", "loop"])
def test_a_model_that_reads_no_parameter_says_zero(name, route):
    found = functions(lambda p, x: x[:, :3], route=route)[name](PARAMS)
    assert not any(bool(leaf.any()) for leaf in leaves(found))
    wanted = functions(lambda p, x: F.linear(F.linear(x, p["w"]), p["v"]))[name](PARAMS)
    assert [leaf.shape for leaf in leaves(found)] == [leaf.shape for leaf in leaves(wanted)]


@pytest.mark.parametrize("route", ["auto", "tape", "vmap", "loop"])
def test_complex_parameters_are_refused_by_name(route):
    params = {**PARAMS, "turn": torch.ones(5, dtype=torch.complex128)}
    fn = lambda p, x: F.linear((F.linear(x, p["w"]) * p["turn"]).real, p["v"])  # noqa: E731
    with pytest.raises(errors.CaptureError, match=r"(?s)'turn'.*view_as_real"):
        P.jacobian(fn, route=route)(params, X)


SHIFTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer": lambda x, b: F.layer_norm(x, (3,), None, b),
    "group": lambda x, b: F.group_norm(x, 3, None, b),
    "batch": lambda x, b: F.batch_norm(x, torch.ones(3).double(), torch.ones(3).double(), None, b),
    "instance": lambda x, b: F.instance_norm(x, bias=b),
    "layer of torch": lambda x, b: torch.layer_norm(x, (3,), bias=b),
    "group of torch": lambda x, b: torch.group_norm(x, 3, None, b),
    "batch of torch": lambda x, b: torch.batch_norm(
        x, None, b, torch.ones(3).double(), torch.ones(3).double(), False, 0.1, 1e-5, False
    ),
    "instance of torch": lambda x, b: torch.instance_norm(x, None, b, None, None, True, 0.1, 1e-5, False),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_products_through_norms_with_a_shift_alone(name):
    """Whose second derivatives torch leaves the shift out of. The oracle adds it by hand."""
    x, params = randn(6, 3, 3, seed=1), {"b": randn(3, seed=2), "v": randn(3, 9, seed=3)}
    norm, shape = SHIFTED[name], (3,) if name.startswith("layer") else (3, 1)

    def model(normed: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        return lambda p, x: F.linear(torch.tanh(normed(x, p["b"])).flatten(1), p["v"])

    one, two = model(norm), model(lambda x, b: norm(x, torch.zeros(3).double()) + b.reshape(shape))
    v = {path: torch.ones_like(leaf) for path, leaf in params.items()}
    wanted = torch.func.jvp(lambda p: two(p, x), (params,), (v,))[1]
    assert close(P.jvp(one)(params, x)(v), wanted)
    slope = torch.func.grad(lambda p: LOSS.value(two(p, x), Y))
    hessian = torch.func.jvp(slope, (params,), (v,))[1]
    found = P.hvp(one, LOSS)(params, (x, Y))(v)
    assert all(close(found[path], hessian[path]) for path in params)


@pytest.mark.parametrize(("z", "cut"), [((0, 5), 5), ((3, 0), 0)], ids=["no outputs", "no inputs"])
def test_layers_without_numbers_add_nothing(z, cut):
    """[0, i] and [o, 0]: kernels, Gram matrices and influence are those of the model without them."""

    def fn(p: Any, x: Tensor) -> Tensor:
        h = F.linear(x, p["w"]) + F.linear(x[:, :cut], p["z"]).sum(1, keepdim=True)
        return F.linear(torch.tanh(h), p["v"])

    params = {"w": randn(3, 5), "v": randn(3, 3, seed=1), "z": randn(*z)}
    x, y = randn(4, 5, seed=2), torch.tensor([0, 1, 2, 1])
    plain: Any = lambda p, x: F.linear(torch.tanh(F.linear(x, p["w"])), p["v"])  # noqa: E731
    own, loss = {path: params[path] for path in ("w", "v")}, kf.losses.cross_entropy()
    for route in ("tape", "vmap", "loop"):
        assert close(P.empirical_ntk(fn, route=route)(params, x), P.empirical_ntk(plain)(own, x))
        assert close(
            P.per_example_gram(fn, loss, route=route)(params, (x, y)), P.per_example_gram(plain, loss)(own, (x, y))
        )
    states = [kf.fit_curvature(f, loss, p, [(x, y)]) for f, p in ((fn, params), (plain, own))]
    found = kf.influence.scores(fn, loss, params, states[0], [(x, y)], [(x, y)], damping=0.1, route="vmap")
    assert close(found, kf.influence.scores(plain, loss, own, states[1], [(x, y)], [(x, y)], damping=0.1))

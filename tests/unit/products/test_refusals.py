"""What has no gradient of its own for every example, and what ends in words in place of an error of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import errors
from tests import oracles
from tests.zoo import CASES, close
from tests.zoo.cases import randn

P = kf.products
LOSS = kf.losses.cross_entropy()
X, Y = randn(6, 4, seed=1), torch.tensor([0, 2, 1, 1, 0, 2])
PARAMS = {"w": randn(5, 4, seed=2), "v": randn(3, 5, seed=3)}


def centred(p: Any, x: Tensor) -> Tensor:
    h = F.linear(x, p["w"])
    return F.linear(torch.tanh(h - h.mean(0)), p["v"])


def turned(p: Any, x: Tensor) -> Tensor:
    """Rows in another order than examples, undone at the end: nothing mixes, but the tape cannot tell rows."""
    return F.linear(torch.tanh(F.linear(x.flip(0), p["w"])), p["v"]).flip(0)


def interleaved(p: Any, x: Tensor) -> Tensor:
    h = torch.tanh(F.linear(torch.cat([x, 2 * x]), p["w"]))
    return F.linear(h.unflatten(0, (2, -1)).mean(0), p["v"])


def functions(fn: Any, **options: Any) -> dict[str, Callable[[Any], Any]]:
    return {
        "grads": lambda p: P.per_example_grads(fn, LOSS, **options)(p, (X, Y)),
        "norms": lambda p: P.per_example_norms(fn, LOSS, **options)(p, (X, Y)),
        "gram": lambda p: P.per_example_gram(fn, LOSS, **options)(p, (X, Y)),
        "ntk": lambda p: P.empirical_ntk(fn, **options)(p, X),
        "jacobian": lambda p: P.jacobian(fn, **options)(p, X),
        "diagonal": lambda p: P.fisher_diagonal(fn, LOSS, **options)(p, (X, Y)),
        "traces": lambda p: P.per_example_traces(fn, LOSS, **options)(p, (X, Y)),
    }


NAMES = list(functions(None))
function = pytest.mark.parametrize("name", NAMES)


@function
@pytest.mark.parametrize("route", ["auto", "tape", "vmap", "loop"])
def test_examples_that_see_each_other_are_refused(name, route):
    with pytest.raises(
        errors.CaptureError,
        match=r"(?s)see each other.*(depends on the other examples|reaches the rows of another).*ggn_vp",
    ):
        functions(centred, route=route)[name](PARAMS)


def test_they_are_refused_by_influence_and_laplace_too():
    plain = lambda p, x: F.linear(torch.tanh(F.linear(x, p["w"])), p["v"])  # noqa: E731
    state = kf.fit_curvature(plain, LOSS, PARAMS, [(X, Y)])
    posterior = kf.laplace.fit(plain, LOSS, PARAMS, [(X, Y)])
    for call in (
        lambda: kf.influence.scores(centred, LOSS, PARAMS, state, [(X, Y)], [(X, Y)], damping=0.1),
        lambda: kf.influence.self_influence(centred, LOSS, PARAMS, state, [(X, Y)], damping=0.1),
        lambda: kf.laplace.predict(posterior, centred, X),
        lambda: kf.laplace.functional_variance(posterior, centred, X),
    ):
        with pytest.raises(errors.CaptureError, match="see each other"):
            call()


@function
@pytest.mark.parametrize("fn", [turned, interleaved])
def test_rows_in_another_order_go_by_another_route(name, fn):
    with pytest.raises(errors.CaptureError, match=r"(?s)(reaches the rows|cannot see).*'vmap'"):
        functions(fn, route="tape")[name](PARAMS)
    with pytest.warns(errors.KFacWarning, match="route='vmap'"):
        found = functions(fn)[name](PARAMS)
    loop = functions(fn, route="loop")[name](PARAMS)
    assert all(close(*sides) for sides in zip(leaves(found), leaves(loop), strict=True))


def leaves(found: Any) -> list[Tensor]:
    return list(found.values()) if isinstance(found, dict) else [found]


@pytest.mark.filterwarnings("ignore::kfac_func._errors.KFacWarning")
def test_and_under_a_gradient():
    def total(route: str) -> Callable[[Any], Tensor]:
        traces = P.per_example_traces(interleaved, LOSS, route=route)  # pyright: ignore[reportArgumentType]
        return lambda p: traces(p, (X, Y)).sum()

    wanted = torch.func.grad(total("loop"))(PARAMS)
    for route in ("auto", "vmap"):
        found = torch.func.grad(total(route))(PARAMS)
        assert all(close(found[path], wanted[path]) for path in PARAMS)
    with pytest.raises(errors.CaptureError):
        torch.func.grad(total("tape"))(PARAMS)


def test_a_graph_has_the_gradients_of_its_nodes_by_a_loop():
    adjacency = torch.eye(6, dtype=torch.float64) + 0.3 * randn(6, 6, seed=8).square()
    fn = kf.batched(lambda p, x: F.linear(x[1] @ torch.tanh(F.linear(x[0], p["w"])), p["v"]), whole=True)
    wanted = torch.func.jacrev(lambda p: fn(p, (X, adjacency)))(PARAMS)
    found = P.jacobian(fn, route="loop")(PARAMS, (X, adjacency))
    assert all(close(found[path], wanted[path]) for path in PARAMS)
    with pytest.raises(errors.HyperparameterError, match="cut into chunks"):
        P.jacobian(fn, route="loop", chunk_size=2)(PARAMS, (X, adjacency))
    with pytest.raises(errors.CaptureError, match="whole=True"):
        P.jacobian(fn, route="vmap")(PARAMS, (X, adjacency))


def test_a_table_as_long_as_the_batch_is_no_example():
    params = {"q": randn(4, 4, seed=4), "o": randn(3, 4, seed=5)}
    fn = lambda p, x: ((x[0] @ p["q"]) @ x[1].mT).softmax(-1) @ x[1] @ p["o"].mT  # noqa: E731
    table = randn(6, 4, seed=6)
    wanted = oracles.example_gradients(lambda p, x: fn(p, (x, table)), params, X, Y, F.cross_entropy)
    for route in ("tape", "vmap", "loop"):
        for size in (None, 2, 4):
            found = P.per_example_grads(fn, LOSS, route=route, chunk_size=size)(params, ((X, table), Y))
            assert all(close(found[path], wanted[path]) for path in params)


# ------------------------------------------------------------------ the numbers


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
}


@pytest.mark.parametrize("name", SHIFTED)
def test_products_through_norms_with_a_shift_alone(name):
    """Whose second derivatives torch leaves the shift out of. The oracle adds it by hand."""
    x, params = randn(6, 3, 3, seed=1), {"b": randn(3, seed=2), "v": randn(3, 9, seed=3)}
    norm, shape = SHIFTED[name], (3,) if name == "layer" else (3, 1)

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


# ------------------------------------------------------------------ what torch would say in other words


def products(fn: Any, params: Any, batch: Any) -> dict[str, Callable[[], Any]]:
    return {
        "hvp": lambda: P.hvp(fn, LOSS)(params, batch),
        "ggn_vp": lambda: P.ggn_vp(fn, LOSS)(params, batch),
        "fisher_vp": lambda: P.fisher_vp(fn, LOSS, kf.estimators.empirical())(params, batch),
        "ggn_factor": lambda: P.ggn_factor(fn, LOSS)(params, batch),
        "fisher_forms": lambda: P.fisher_forms(fn, LOSS)(params, batch),
        "kl_quadratic": lambda: P.kl_quadratic(fn, LOSS)(params, batch),
        "norm": lambda: P.fisher_rao_norm(fn, LOSS)(params, batch),
        "grads": lambda: P.per_example_grads(fn, LOSS)(params, batch),
        "loop": lambda: P.per_example_gram(fn, LOSS, route="loop")(params, batch),
        "vmap": lambda: P.per_example_traces(fn, LOSS, route="vmap")(params, batch),
        "fit": lambda: kf.laplace.fit(fn, LOSS, params, [batch]),
        "curvature": lambda: kf.fit_curvature(fn, LOSS, params, [batch]),
        "dense": lambda: kf.testing.dense_ggn(fn, LOSS, params, batch),
        "accumulate": lambda: P.accumulate(P.ggn_vp(fn, LOSS), params, [batch], loss=LOSS)(params),
    }


TAKERS = list(products(None, None, None))
taker = pytest.mark.parametrize("name", TAKERS)


def several(p: Any, x: Tensor) -> Any:
    h = F.linear(x, p["w"])
    return {"logits": F.linear(h, p["v"]), "hidden": h}


@taker
def test_outputs_that_are_no_tensor(name):
    with pytest.raises(errors.BatchError, match=r"(?s)something else than one tensor.*output='logits'"):
        products(several, PARAMS, (X, Y))[name]()
    wanted = products(lambda p, x: several(p, x)["logits"], PARAMS, (X, Y))[name]()
    found = products(kf.batched(several, output="logits"), PARAMS, (X, Y))[name]()
    if isinstance(wanted, Tensor):
        assert close(found, wanted)


@taker
@pytest.mark.usefixtures("unchecked")
def test_batches_that_are_no_pair(name):
    batch = {"input_ids": X, "labels": Y}
    with pytest.raises(errors.BatchError, match=r"(?s)a pair \(inputs, targets\).*batch\['labels'\]"):
        products(lambda p, x: F.linear(F.linear(x["input_ids"], p["w"]), p["v"]), PARAMS, batch)[name]()


@taker
def test_a_model_that_writes_into_its_parameters_finds_copies(name):
    params, ids = {"table": 5 * randn(9, 4, seed=6), "v": randn(3, 20, seed=7)}, torch.arange(30).remainder(9)
    kept = {path: leaf.clone() for path, leaf in params.items()}
    fn = lambda p, x: F.linear(F.embedding(x, p["table"], max_norm=1.0).flatten(1), p["v"])  # noqa: E731
    if name != "dense":  # which makes parameters of its own
        with pytest.raises(errors.CaptureError, match=r"(?s)writes into its parameter 'table'.*clone"):
            products(fn, params, (ids.reshape(6, 5), Y))[name]()
    assert all(torch.equal(params[path], kept[path]) for path in params)


def test_inputs_in_lists_are_those_in_tuples():
    fn, params = kf.make_functional(nn.Bilinear(4, 4, 3).double())
    found = [P.per_example_grads(fn, LOSS, route="loop")(params, (kind((X, 2 * X)), Y)) for kind in (list, tuple)]
    assert all(close(found[0][path], found[1][path]) for path in params)

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
from tests.zoo import close
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


@pytest.mark.parametrize("route", ["auto", "tape", "vmap", "loop"])
def test_logits_between_the_examples_are_refused(route):
    fn = lambda p, x: (h := torch.tanh(F.linear(x, p["w"]))) @ h.mT  # noqa: E731
    with pytest.raises(errors.CaptureError, match=r"(?s)see each other|'vmap'"):
        P.per_example_norms(fn, LOSS, route=route)({"w": PARAMS["w"]}, (X, torch.arange(6)))


@pytest.mark.parametrize("route", ["auto", "loop"])
@pytest.mark.filterwarnings("ignore::kfac_func._errors.KFacWarning")
def test_outputs_as_long_as_the_longest_example(route):
    """Which is a length of the batch, and no mixing."""
    lengths, x = torch.tensor([4, 2, 3, 1, 4, 2]), randn(6, 4, 4, seed=5)

    def fn(p: Any, inputs: Any) -> Tensor:
        x, lengths = inputs
        h = torch.tanh(F.linear(x, p["w"]))[:, : int(lengths.max())]
        return F.linear(h, p["v"]) * (torch.arange(h.shape[1]) < lengths[:, None]).unsqueeze(-1)

    found = P.jacobian(fn, route=route)(PARAMS, (x, lengths))
    wanted = torch.func.jacrev(lambda p: fn(p, (x, lengths)))(PARAMS)
    assert all(close(found[path], wanted[path]) for path in PARAMS)

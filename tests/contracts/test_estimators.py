"""The contract of every estimator, by enumeration of all draws: no sampling tolerance anywhere."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._tree import leaves, tree_map
from kfac_func.blocks import per_example, squares
from kfac_func.estimators import Estimator
from tests import oracles
from tests.zoo import CASES, Case, close, curvature_of, measured, outer, run, subset

CURVATURE = kf.curvature.blockwise(kf.curvature.kronecker(), kf.curvature.diagonal())
EXACT, EMPIRICAL = kf.estimators.exact(), kf.estimators.empirical()


def _moments(case: Case, estimator: Estimator, **options: Any) -> Any:
    return CURVATURE.measure(measured(case, estimator, **options))


def _same(one: Any, two: Any, tolerance: float = 1e-10) -> bool:
    return all(close(a, b, tolerance) for a, b in zip(leaves(one), leaves(two), strict=True))


def _identical(one: Any, two: Any) -> bool:
    return all(bool((a == b).all()) for a, b in zip(leaves(one), leaves(two), strict=True))


def _average(weighted: list[tuple[float, Any]]) -> Any:
    total = None
    for weight, moments in weighted:
        part = tree_map(lambda m, w=weight: w * m, moments)
        total = part if total is None else tree_map(torch.add, total, part)
    return total


# ------------------------------------------------------------------ all labels, weighted by their probability


def _reduced(name: str, reduction: str) -> Case:
    """A case of the zoo with its loss under another reduction."""
    make = {
        "mlp": lambda: kf.losses.cross_entropy(reduction=reduction),
        "conv": lambda: kf.losses.cross_entropy(reduction=reduction),
        "attention": lambda: kf.losses.cross_entropy(class_dim=-1, reduction=reduction),
        "deep_linear": lambda: kf.losses.mse(reduction=reduction, scale=0.7),
        "bernoulli": lambda: kf.losses.bce_with_logits(reduction=reduction),
    }
    return CASES[name]._replace(loss=make[name]())


def _labels(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Every label of one example, as noise that draws it, and its probability. z is the output [1, *out]."""
    z = case.fn(case.params, case.inputs)
    if case.loss.noise_shape(z) == tuple(z.shape):
        if not set(case.targets.flatten().tolist()) <= {
            0.0,
            1.0,
        }:  # Gaussian: two nodes per output give second moments exactly
            nodes = 0.5 * (1 + torch.erf(torch.tensor([-1.0, 1.0], dtype=torch.float64) / 2**0.5))
            return [(nodes[list(k)].reshape(z.shape), torch.tensor(0.5 ** z.numel())) for k in _choices(2, z.numel())]
        p = z.sigmoid().flatten()
        return [
            (torch.where(y, p / 2, (1 + p) / 2).reshape(z.shape), torch.where(y, p, 1 - p).prod())
            for y in (torch.tensor(k, dtype=torch.bool) for k in _choices(2, z.numel()))
        ]
    p = z.softmax(-1).reshape(-1, z.shape[-1])
    middle = p.cumsum(1) - p / 2
    shape = case.loss.noise_shape(z)
    found = []
    for label in _choices(p.shape[1], len(p)):
        index = torch.tensor(label)[:, None]
        found.append((middle.gather(1, index).reshape(shape), p.gather(1, index).prod()))
    return found


def _choices(symbols: int, length: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(symbols), repeat=length))


def _enumerated(case: Case, samples: int = 1) -> Any:
    """monte_carlo averaged over all draws of all examples, one example at a time. N times that for a sum."""
    n, estimator, found = len(case.targets), kf.estimators.monte_carlo(samples), []
    factor = n if case.loss.reduction == "sum" else 1
    for k in range(n):
        one = subset(case, k, k + 1)
        for draws in itertools.product(_labels(one), repeat=samples):
            noise = torch.stack([u for u, _ in draws])
            weight = float(torch.stack([p for _, p in draws]).prod())
            found.append((weight / n, _moments(one, estimator, noise=noise)))
    averaged = _average(found)
    return _scaled(averaged, factor)


def _scaled(moments: Any, factor: float) -> Any:
    """The moments of a loss that is `factor` times as large (times √factor in every gradient)."""
    matrix = {k: m._replace(g=m.g * factor) for k, m in moments.matrix.items()}
    return moments._replace(
        matrix=matrix, vector={k: m._replace(squares=m.squares * factor) for k, m in moments.vector.items()}
    )


ENUMERATED = [
    (name, reduction)
    for name in ("mlp", "deep_linear", "bernoulli", "attention")
    for reduction in ("mean", "sum", "batchmean")
]


@pytest.mark.parametrize(("name", "reduction"), ENUMERATED)
def test_monte_carlo_over_all_labels_is_exact(name, reduction):
    case = _reduced(name, reduction)
    small = subset(case, 0, 3)
    assert _same(_enumerated(small), _moments(small, EXACT))


@pytest.mark.parametrize("name", ["mlp", "bernoulli"])
def test_monte_carlo_over_all_pairs_of_labels_is_exact(name):
    small = subset(CASES[name], 0, 2)
    assert _same(_enumerated(small, samples=2), _moments(small, EXACT))


def test_one_label_alone_is_not_exact():
    small = subset(CASES["mlp"], 0, 1)
    noise, _ = _labels(small)[0]
    assert not _same(_moments(small, kf.estimators.monte_carlo(), noise=noise[None]), _moments(small, EXACT), 1e-3)


@pytest.mark.parametrize(
    ("name", "samples"),
    [("mlp", 1), ("deep_linear", 1), ("mean_square", 1), ("recurrent", 1), ("deep_linear", 2), ("bernoulli", 2)],
)
def test_curvature_prop_over_all_signs_is_exact(name, samples):
    """The same signs for all examples of a batch: examples do not mix, so no other patterns are needed."""
    case = subset(CASES[name], 0, 3)
    z = case.fn(case.params, case.inputs)
    every = [
        torch.stack(p) for p in itertools.product(list(oracles.patterns(z[0].numel(), (0.25, 0.75))), repeat=samples)
    ]
    estimator = kf.estimators.curvature_prop(samples)
    found = [
        (1 / len(every), _moments(case, estimator, noise=u.reshape(samples, 1, *z.shape[1:]).expand(samples, *z.shape)))
        for u in every
    ]
    assert _same(_average(found), _moments(case, EXACT))


def test_curvature_prop_mixes_positions_with_independent_signs():
    """Two tokens, two classes: 16 patterns for the attention net."""
    case = subset(CASES["attention"], 0, 2)._replace(
        inputs=CASES["attention"].inputs[:2, :2], targets=CASES["attention"].targets[:2, :2]
    )
    estimator = kf.estimators.curvature_prop()
    every = [u.reshape(1, 1, 2, 2).expand(1, 2, 2, 2) for u in oracles.patterns(4, (0.25, 0.75))]
    found = _average([(1 / len(every), _moments(case, estimator, noise=u)) for u in every])
    assert _same(found, _moments(case, EXACT))
    aligned = _average([(0.5, _moments(case, estimator, noise=torch.full((1, 2, 2, 2), u))) for u in (0.25, 0.75)])
    assert not _same(aligned, _moments(case, EXACT), 1e-3)


# ------------------------------------------------------------------ exact, in pieces


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
@pytest.mark.parametrize("name", CASES)
def test_chunks_are_the_whole(name, chunk):
    case, pieces = CASES[name], kf.estimators.exact(chunk_size=chunk)
    wanted = _moments(case, EXACT)
    assert _same(_moments(case, pieces), wanted)
    assert _same(run(case, pieces, measure=CURVATURE.measure)[2].moments, wanted)
    one, two = measured(case, pieces), measured(case)
    for block in one:
        mine, whole = one[block].uses[0].grads, two[block].uses[0].grads
        assert mine is not None
        assert whole is not None
        assert mine.shape == whole.shape


@pytest.mark.parametrize(
    "estimator", [EXACT, EMPIRICAL, kf.estimators.forward_only(), kf.estimators.monte_carlo(3)], ids=lambda e: e.name
)
@pytest.mark.parametrize("name", ["conv", "tokens", "tied"])
def test_measuring_inside_the_step_is_measuring_after_it(name, estimator):
    case = CASES[name]
    inside = run(case, estimator, measure=CURVATURE.measure, seed=3)[2]
    assert _same(inside.moments, CURVATURE.measure(run(case, estimator, seed=3)[2].blocks()))
    assert leaves((inside.inputs, inside.grads, inside.rest)) == []


# ------------------------------------------------------------------ empirical and forward only


@pytest.mark.parametrize("name", CASES)
def test_empirical_is_a_loop_of_per_example_gradients(name):
    case = CASES[name]
    own = oracles.example_gradients(case.fn, case.params, case.inputs, case.targets, case.value)
    for block, mine in measured(case, EMPIRICAL).items():
        wanted = oracles.laid_out(case.blocks[block], own, 1)
        assert close(per_example(mine)[0].flatten(1), wanted)
        assert close(squares(mine).flatten(), wanted.square().mean(0))
        assert not close(outer(mine), curvature_of(name).block(case.blocks[block]), 1e-3)


@pytest.mark.parametrize("name", ["deep_linear", "bernoulli"])
def test_empirical_of_a_sum(name):
    """F of a sum is N times that of the mean over examples."""
    one, two = (measured(_reduced(name, r), EMPIRICAL) for r in ("sum", "batchmean"))
    for block in one:
        assert close(outer(one[block]), len(CASES[name].targets) * outer(two[block]))


@pytest.mark.parametrize("name", CASES)
def test_forward_only_has_no_output_factor(name):
    case = CASES[name]
    forward, exact = (_moments(case, e) for e in (kf.estimators.forward_only(), EXACT))
    for block, m in forward.matrix.items():
        if m.turned != ():
            assert torch.allclose(m.g.values, m.kept / m.positions)  # 1 but for padding, whose rows are zero
            assert bool((m.turned.a.values == 1).all())
            continue
        assert torch.allclose(m.g.values, m.kept / m.positions)  # 1 but for padding, whose rows are zero
        assert _same(m.a, exact.matrix[block].a)
        width = m.g.values.shape[-1]
        eye = torch.eye(width, dtype=torch.float64).expand(*m.g.values.shape, width) * (m.kept / m.positions)
        dense = kf.curvature.kronecker().dense(exact.matrix[block]._replace(g=eye))
        assert close(kf.curvature.kronecker().dense(m), dense)
        assert close(squares(measured(case, kf.estimators.forward_only())[block]).flatten(), dense.diagonal())
    assert all(bool((m.squares == 1).all()) for m in forward.vector.values())


# ------------------------------------------------------------------ randomness

RANDOM = {
    "monte_carlo": kf.estimators.monte_carlo(),
    "monte_carlo 3": kf.estimators.monte_carlo(3),
    "curvature_prop": kf.estimators.curvature_prop(),
    "curvature_prop 2": kf.estimators.curvature_prop(2),
}
draws = pytest.mark.parametrize("estimator", RANDOM.values(), ids=RANDOM)


@draws
@pytest.mark.parametrize("name", ["mlp", "attention", "bernoulli", "deep_linear"])
def test_seeds(name, estimator):
    case, before = CASES[name], torch.get_rng_state()
    one, two, other = (run(case, estimator, seed=s)[2] for s in (1, 1, 2))
    assert _identical(one.grads, two.grads)
    assert not _identical(one.grads, other.grads)
    assert bool((torch.get_rng_state() == before).all())


@draws
def test_noise_is_the_draw_of_the_generator(estimator):
    case = CASES["attention"]
    shape = estimator.noise(case.loss, case.fn(case.params, case.inputs))
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(5))
    assert _identical(run(case, estimator, noise=noise)[2].grads, run(case, estimator, seed=5)[2].grads)


@pytest.mark.parametrize("estimator", [EXACT, EMPIRICAL, kf.estimators.forward_only()], ids=lambda e: e.name)
def test_others_need_no_generator(estimator):
    step = kf.value_grad_and_stats(CASES["mlp"].fn, CASES["mlp"].loss, estimator=estimator)
    assert _same(step(CASES["mlp"].params, CASES["mlp"].batch)[2], run(CASES["mlp"], estimator, seed=7)[2])


def test_all_estimators_differ():
    every = [EXACT, EMPIRICAL, kf.estimators.forward_only(), *RANDOM.values()]
    found = [_moments(CASES["mlp"], e, seed=1).matrix["first.w"] for e in every]
    dense = [kf.curvature.kronecker().dense(m) for m in found]
    assert not any(close(a, b, 1e-3) for a, b in itertools.combinations(dense, 2))

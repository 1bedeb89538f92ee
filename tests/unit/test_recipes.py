"""Every recipe learns in a chain, and every one of its options changes the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._errors import HyperparameterError
from kfac_func._tree import leaves
from tests.zoo import CASES, close, run

CASE = CASES["conv"]
BATCHES = [run(CASE._replace(inputs=c * CASE.inputs + c))[2] for c in (1.0, 0.7, 1.6)] * 2
_, GRADS, _ = run(CASE)
PERIODS: dict[str, dict[str, Any]] = {
    "damping": {"damping": 1e-2},
    "decay": {"decay": 0.5},
    "average": {"average": "warmup"},
    "constant": {"average": "constant"},
    "refresh_every": {"refresh_every": 4},
}
ALWAYS: dict[str, dict[str, Any]] = {
    "damping by path": {"damping": {"head.*": 1e-2, "**": 1e-3}},
    "burn_in": {"burn_in": 6},
    "l2": {"l2": 0.3},
}
PERIODS |= ALWAYS
TOGETHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what changes nothing unless something else is set
    "growing": ({"refresh_every": 3}, {"growing": False}),
    "stagger": ({"refresh_every": 2, "growing": False}, {"stagger": True}),
    "l2_mask": ({"l2": 0.3}, {"l2_mask": "head.*"}),
}
SETTINGS = PERIODS | {"split": {"split": "none"}}
FULL = {"iterations": {"iterations": 1}, "tolerance": {"tolerance": 0.9}, "radius": {"radius": 0}}
SUMS = SETTINGS | FULL
RECIPES: dict[str, tuple[Callable[..., Any], dict[str, dict[str, Any]]]] = {
    "kfac": (
        kf.kfac,
        SETTINGS
        | {"exact": {"split": "exact"}}
        | {
            key: {"curvature": kf.curvature.kronecker(**{key: value})}
            for key, value in {"sua": True, "sides": "input", "max_dim": 4, "centred": True}.items()
        }
        | {"oversize": {"curvature": kf.curvature.kronecker(max_dim=4, oversize="diagonal")}},
    ),
    "ekfac": (
        kf.ekfac,
        PERIODS
        | {
            "intra_batch": {"scalings": "intra_batch"},
            "mean_gradient": {"scalings": "mean_gradient"},
            "scale_every": {"scale_every": 3},
            "sua": {"sua": True},
        }
        | {
            key: {"curvature": kf.curvature.eigen(**{key: value})}
            for key, value in {"max_dim": 4, "centred": True}.items()
        },
    ),
    "kpsvd": (kf.kpsvd, SUMS | {"exact": {"split": "exact"}}),
    "deflation": (kf.deflation, SUMS | {"rank": {"rank": 3}}),
    "corrected": (kf.corrected, SUMS),
    "lanczos": (kf.lanczos, SETTINGS | {"rank": {"rank": 3}, "steps": {"steps": 2}, "radius": {"radius": 0}}),
    "inverse_free": (
        kf.inverse_free,
        SETTINGS
        | {
            "diagonal": {"structure": "diagonal"},
            "lower_triangular": {"structure": "lower_triangular"},
            "block_diagonal": {"structure": "block_diagonal", "block_size": 3},
            "block_size": {"structure": "block_diagonal", "block_size": 4},
            "adaptive": {"adaptive": True},
            "step": {"step": 0.3},
            "steps": {"steps": 3},
            "warm_steps": {"warm_steps": 2},
            "momentum": {"momentum": 0.5},
            "dtype": {"dtype": torch.bfloat16},
        },
    ),
    "two_level": (
        kf.two_level_kfac,
        SETTINGS
        | {
            "coarse": {"coarse": "residual"},
            "form": {"form": "additive"},
            "weights": {"weights": (0.5, 2.0)},
            "krylov": {"krylov": True},
        },
    ),
    "two_level of cross factors": (
        lambda **options: kf.two_level_kfac("tselepidis", form="additive", **options),
        {"decay": {"decay": 0.5}, "resample": {"resample": "area"}},
    ),
    "exact full": (
        kf.exact_natural_gradient,
        ALWAYS
        | {"damping": PERIODS["damping"], "refresh_every": {"refresh_every": 4}}
        | {"block_diagonal": {"block_diagonal": True}, "rule": {"rule": "heuristic"}, "window": {"window": 3}},
    ),
    "exact window": (
        lambda **options: kf.exact_natural_gradient(window=3, **options),
        {"decay": {"decay": 0.5}, "average": PERIODS["average"]},
    ),
}


def updates_of(make: Callable[..., Any], **options: Any) -> list[Tensor]:
    """The last of several updates in a chain, on batches that differ."""
    if "curvature" in options and make is not kf.kfac:
        make = kf.kfac
    tx = kf.chain(make(**options), kf.sgd(0.1))
    updates, state = GRADS, tx.init(CASE.params)
    for stats in BATCHES:
        updates, state = tx.update(GRADS, state, CASE.params, stats=stats)
    return leaves(updates)


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_changes_the_update(name):
    make, options = RECIPES[name]
    base = updates_of(make)
    products = [(u * g).sum() for u, g in zip(base, leaves(GRADS), strict=True)]
    assert torch.stack(products).sum() < 0
    same = updates_of(make)
    assert all(torch.equal(x, y) for x, y in zip(base, same, strict=True))
    for option, changed in options.items():
        found = updates_of(make, **changed)
        assert not all(close(x, y, 1e-7) for x, y in zip(base, found, strict=True)), option


@pytest.mark.parametrize("option", TOGETHER)
@pytest.mark.parametrize("name", RECIPES)
def test_every_option_changes_the_update_beside_another(name, option):
    make, (given, more) = RECIPES[name][0], TOGETHER[option]
    base = updates_of(make, **given)
    if option == "stagger" and ("two_level" in name or "exact" in name):
        with pytest.raises(HyperparameterError, match="some blocks at a time"):
            updates_of(make, **given, **more)
        return
    found = updates_of(make, **given, **more)
    assert not all(close(x, y, 1e-7) for x, y in zip(base, found, strict=True))


def test_exact_blocks_can_be_staggered():
    one, two = (
        updates_of(kf.exact_natural_gradient, block_diagonal=True, refresh_every=2, growing=False, stagger=stagger)
        for stagger in (False, True)
    )
    assert not all(close(x, y, 1e-7) for x, y in zip(one, two, strict=True))


def test_scalings_have_a_period_wherever_there_are_some():
    eigen = kf.curvature.eigen()
    plain = updates_of(kf.kfac, curvature=eigen, scale_every=3)
    assert all(torch.equal(x, y) for x, y in zip(plain, updates_of(kf.ekfac, scale_every=3), strict=True))
    one, two = (updates_of(lambda k=k: kf.two_level_kfac(curvature=eigen, scale_every=k)) for k in (1, 3))
    assert not all(close(x, y, 1e-7) for x, y in zip(one, two, strict=True))


def test_a_recipe_takes_a_leaf_alone_and_a_whole_tree():
    rules = {"head.*": kf.curvature.diagonal(), "**": kf.curvature.kronecker()}
    mixed, plain, diagonal = (
        kf.kfac(c) for c in (kf.curvature.by_path(rules), kf.curvature.kronecker(), kf.curvature.diagonal())
    )
    (one, two, three) = (tx.update(GRADS, tx.init(CASE.params), stats=BATCHES[0])[0] for tx in (mixed, plain, diagonal))
    assert all(torch.equal(one[path], (three if path.startswith("head") else two)[path]) for path in GRADS)
    assert not close(one["head.weight"], two["head.weight"], 1e-3)


def test_two_level_kfac_takes_any_inner_curvature():
    plain = updates_of(kf.two_level_kfac)
    for inner in (kf.curvature.eigen(), kf.curvature.by_path({"**": kf.curvature.kpsvd()})):
        found = updates_of(lambda inner=inner: kf.two_level_kfac(curvature=inner))
        wanted = updates_of(lambda inner=inner: kf.kfac(kf.curvature.two_level(inner)))
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
        assert not all(close(x, y, 1e-7) for x, y in zip(found, plain, strict=True))


def test_the_first_matching_rule_decides():
    a, b = kf.curvature.kronecker(), kf.curvature.diagonal()
    for rules, wanted in (({"*.weight": a, "**": b}, a), ({"**": b, "head.*": a}, b)):
        tx, own = kf.kfac(kf.curvature.by_path(rules)), kf.kfac(wanted)
        found, other = (t.update(GRADS, t.init(CASE.params), stats=BATCHES[0])[0] for t in (tx, own))
        assert all(torch.equal(found[path], other[path]) for path in GRADS)


def test_rules_for_matrices_leave_scales_to_the_diagonal():
    case = CASES["tokens"]
    _, grads, stats = run(case)
    rules = kf.curvature.by_path({"**": kf.curvature.kronecker()})
    (one, two) = (tx.update(grads, tx.init(case.params), stats=stats)[0] for tx in (kf.kfac(rules), kf.kfac()))
    assert all(torch.equal(one[path], two[path]) for path in grads)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_scalings_have_a_period_of_their_own(every):
    """Counts of absorbed batches and scalings, over updates with and without statistics."""
    tx = kf.ekfac(scale_every=every, refresh_every=4)
    state = tx.init(CASE.params)
    scaled = 0
    for step in range(12):
        stats = BATCHES[step % 3] if step % 4 != 3 else None
        due = state.factored == () or step % min(every, 1 + step // every) == 0
        scaled += stats is not None and due
        _, state = tx.update(GRADS, state, stats=stats)
        assert int(state.scaled) == scaled
    assert int(state.observed) == 9
    assert scaled < 9 or every == 1


def test_scale_can_be_asked_for():
    tx = kf.ekfac(scale_every=5, refresh_every=1)
    _, state = tx.update(GRADS, tx.init(CASE.params), stats=BATCHES[0])
    _, with_it = tx.update(GRADS, state, stats=BATCHES[1], scale=True)
    _, without = tx.update(GRADS, state, stats=BATCHES[1], scale=False)
    assert (int(with_it.scaled), int(without.scaled)) == (2, 1)


def test_a_batch_that_is_not_finite_is_rejected_by_every_recipe():
    bad = run(CASE._replace(inputs=CASE.inputs * float("nan")))[2]
    for name, (make, _) in RECIPES.items():
        tx = make()
        _, state = tx.update(GRADS, tx.init(CASE.params), stats=BATCHES[0])
        _, after = tx.update(GRADS, state, stats=bad, refresh=False, scale=True)
        assert int(after.rejected) == 1, name
        kept = zip(leaves(state.curvature), leaves(after.curvature), strict=True)
        assert all(torch.equal(x, y) for x, y in kept), name
        first, _ = tx.update(GRADS, tx.init(CASE.params), stats=bad)
        assert all(torch.equal(x, y) for x, y in zip(leaves(first), leaves(GRADS), strict=True)), name

"""Cases of `test_errors` for curvature: structures, their options, and what they ask of statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import errors
from tests.error_cases import Case, wrong

FN, PARAMS = kf.make_functional(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
C = kf.curvature
HYPER, STATE = errors.HyperparameterError, errors.StateError


def learned(curvature: Any, estimator: Any = None, measure: Any = None, **settings: Any) -> Callable[[], Any]:
    """A K-FAC state with a curvature meets the statistics of a batch."""

    def call() -> Any:
        estimator_ = kf.estimators.exact() if estimator is None else estimator
        run: Callable[..., Any] = kf.value_grad_and_stats(FN, kf.losses.mse(), estimator=estimator_, measure=measure)
        _, _, stats = run(PARAMS, (torch.arange(12.0).reshape(4, 3), torch.zeros(4, 2)))
        return kf.observe(kf.kfac(curvature, **settings).init(PARAMS), stats)

    return call


def places(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["w"]) + F.embedding(torch.arange(2), p["e"]).sum(1)


def nothing() -> None:
    params = {"w": torch.ones(2, 0)}
    run: Callable[..., Any] = kf.value_grad_and_stats(
        lambda p, x: F.linear(x, p["w"]), kf.losses.mse(), estimator=kf.estimators.exact()
    )
    stats = run(params, (torch.ones(4, 0), torch.zeros(4, 2)))[2]
    kf.observe(kf.kfac(C.full()).init(params), stats)


def resized() -> None:
    run: Callable[..., Any] = kf.value_grad_and_stats(FN, kf.losses.mse(), estimator=kf.estimators.exact())
    state = kf.kfac(C.block_diagonal(window=2)).init(PARAMS)
    for n in (4, 3):
        state = kf.observe(state, run(PARAMS, (torch.ones(n, 3), torch.zeros(n, 2)))[2])


def shared() -> None:
    params = {"w": torch.ones(2, 3), "e": torch.ones(2, 4)}
    run: Callable[..., Any] = kf.value_grad_and_stats(places, kf.losses.mse(), estimator=kf.estimators.monte_carlo())
    stats = run(params, (torch.ones(4, 3), torch.zeros(4, 2)), generator=torch.Generator().manual_seed(0))[2]
    kf.observe(kf.kfac(C.full()).init(params), stats)


def crossed(update: Callable[[Any, Any], Any]) -> Callable[[], Any]:
    """What becomes of the state of kfac() after one batch."""
    return lambda: update(learned(C.kronecker())(), PARAMS)


WIDE = PARAMS | {"0.weight": torch.ones(3, 3)}
MISMATCH = errors.TreeMismatchError
MOMENTS = C.blockwise(C.eigen()).measure

CASES = {
    "coarse": Case(lambda: C.two_level(C.kronecker(), wrong("nicolas")), HYPER, "'nicolas'", "a function"),
    "form": Case(lambda: kf.two_level_kfac(form=wrong("sum")), HYPER, "form", "'residual' or 'additive'"),
    "resample": Case(lambda: kf.two_level_kfac(resample=wrong("cubic")), HYPER, "resample", "'nearest' or 'area'"),
    "weights": Case(lambda: kf.two_level_kfac(weights=wrong((1.0,))), HYPER, "weights", "two finite numbers"),
    "krylov": Case(lambda: kf.two_level_kfac("spectral", krylov=True), HYPER, "'spectral'", "leave out krylov"),
    "cross factors": Case(lambda: kf.two_level_kfac("tselepidis"), HYPER, "'tselepidis'", "'additive'"),
    "vectors that do not fit": Case(
        learned(C.two_level(C.kronecker(), lambda ones: {"1.weight": torch.ones(3)})), STATE, "'1.weight'", "one vector"
    ),
    "a space without factors": Case(
        learned(C.two_level(C.identity(), "spectral")), STATE, ".weight'", "another coarse space"
    ),
    "a spectral space over all": Case(
        learned(C.two_level(C.full(), "spectral")), HYPER, "every block", "blockwise()"
    ),
    "solver": Case(lambda: C.kronecker(wrong("lu")), HYPER, "'lu'", "'cholesky' or 'eigh'"),
    "sides": Case(lambda: C.kronecker(sides=wrong("left")), HYPER, "sides", "'both' or 'input' or 'output'"),
    "max_dim": Case(lambda: C.eigen(max_dim=0), HYPER, "max_dim", "at least 1"),
    "scalings": Case(lambda: C.eigen(wrong("ra")), HYPER, "'ra'", "'mean_gradient'"),
    "sweeps": Case(lambda: C.eigen(basis="iteration", sweeps=0), HYPER, "sweeps", "at least 1"),
    "share": Case(lambda: kf.ekfac(basis="iteration", share=0.0), HYPER, "share", "a number in (0, 1]"),
    "no rules": Case(lambda: C.by_path({}), HYPER, "by_path", "kronecker()"),
    "no rule for a block": Case(learned(C.by_path({"0.*": C.diagonal()})), HYPER, "'1.weight'", "add a last rule '**'"),
    "a rule without a block": Case(
        learned(C.by_path({"head.*": C.diagonal(), "**": C.kronecker()})), HYPER, "'head.*'", "mend the pattern"
    ),
    "no damping for a block": Case(learned(C.kronecker(), damping={"0.*": 0.1}), HYPER, "'1.weight'", "rule '**'"),
    "a damping without a block": Case(
        learned(C.kronecker(), damping={"head.*": 0.1, "**": 0.2}), HYPER, "'head.*' of damping", "mend the pattern"
    ),
    "kpsvd solver": Case(lambda: C.kpsvd(wrong("lu")), HYPER, "'lu'", "'cholesky' or 'eigh'"),
    "terms": Case(lambda: C.deflation(0), HYPER, "rank", "at least 1"),
    "exact damping of a sum": Case(
        learned(C.deflation(), split="exact"), HYPER, "deflation[2]", "split='pi' or split='none'"
    ),
    "no vectors": Case(learned(C.kpsvd(), kf.estimators.forward_only()), STATE, "'0.weight'", "use monte_carlo()"),
    "step": Case(lambda: C.inverse_free(step=0.0), HYPER, "step", "(0, 1]"),
    "exact damping of roots": Case(learned(C.inverse_free(), split="exact"), HYPER, "inverse_free()", "adaptive=True"),
    "rule": Case(lambda: C.block_diagonal(rule=wrong("lm")), HYPER, "'lm'", "'standard' or 'heuristic'"),
    "window of two sizes": Case(resized, STATE, "one window", "window=1 may change it"),
    "full of nothing": Case(nothing, STATE, "no block for full()", "kronecker()"),
    "full with a shared use": Case(shared, STATE, "'e'", "block_diagonal()"),
    "centred chunks": Case(
        learned(C.kronecker(), kf.estimators.exact(1), C.blockwise(C.kronecker(centred=True)).measure),
        HYPER, "centred", "leave `measure=`",
    ),
    "another curvature": Case(
        crossed(lambda state, grads: kf.ekfac().update(grads, state)), STATE, "another curvature", "tx.init(params)"
    ),
    "another width": Case(
        crossed(lambda state, _: kf.precondition(state, WIDE)), MISMATCH, "'0.weight' of shape [3, 3]", "a new state"
    ),
    "moments already": Case(learned(C.eigen(), measure=MOMENTS), STATE, "eigen", "leave `measure=` out"),
}  # fmt: skip

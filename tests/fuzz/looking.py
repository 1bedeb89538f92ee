"""What all checks share: the case at hand, comparisons, and the options that are drawn for every check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kfac_func as kf
from tests.fuzz.cases import Case
from tests.fuzz.draw import Draw
from tests.fuzz.oracles import Truth
from tests.fuzz.trees import vector


class Wrong(Exception):
    """A number of the library that is not the oracle's."""


class Pointless(Exception):
    """The case does not fit the check."""


class Look(NamedTuple):
    """What a check may read."""

    case: Case
    truth: Truth
    draw: Draw

    @property
    def tolerance(self) -> float:
        if "rough" in self.case.traits or "half" in self.case.traits:
            return 0.05
        return 1e-7 if self.case.dtype == torch.float64 else 2e-3

    def generator(self, seed: int = 1) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def seeded(self) -> None:
        torch.manual_seed(self.case.seed)


def agree(what: str, got: Tensor, want: Tensor, tolerance: float, scale: Tensor | None = None) -> None:
    """Raise Wrong unless got = want up to `tolerance` of the norm of `scale` (of want)."""
    if got.shape != want.shape:
        raise Wrong(f"{what}: shape {list(got.shape)}, wanted {list(want.shape)}")
    if want.dtype.itemsize < 4 and float(want.abs().max()) > torch.finfo(want.dtype).max / 8:
        raise Pointless
    floor = 1e-3 * torch.finfo(want.dtype).eps ** 0.5 if want.dtype != torch.float64 else 1e-12
    got, want = (x.detach().to(torch.promote_types(x.dtype, torch.float64)) for x in (got, want))
    size = float((want if scale is None else scale.detach().double()).norm())
    off = float((got - want).norm())
    if not off <= tolerance * size + floor:
        raise Wrong(f"{what}: off by {off / max(size, 1e-300):.2g} of {size:.3g}")


def finite(what: str, tree: Any) -> None:
    if not bool(vector(tree).isfinite().all()):
        raise Wrong(f"{what}: not finite")


def exact(look: Look) -> kf.estimators.Estimator:
    return kf.estimators.exact(look.draw.pick(None, None, 1, 2))


ESTIMATORS: dict[str, Callable[[], Any]] = {
    "monte_carlo": kf.estimators.monte_carlo,
    "monte_carlo(2)": lambda: kf.estimators.monte_carlo(2),
    "curvature_prop": kf.estimators.curvature_prop,
    "empirical": kf.estimators.empirical,
    "exact": kf.estimators.exact,
    "exact(2)": lambda: kf.estimators.exact(2),
    "forward_only": kf.estimators.forward_only,
}
RECIPES: dict[str, Callable[[], Any]] = {
    "kfac": lambda: kf.kfac(damping=0.1),
    "kfac none": lambda: kf.kfac(damping=0.1, split="none"),
    "kfac exact": lambda: kf.kfac(damping=0.1, split="exact"),
    "diagonal": lambda: kf.kfac(kf.curvature.diagonal(), damping=0.1),
    "identity": lambda: kf.kfac(kf.curvature.identity(), damping=0.1),
    "ekfac": lambda: kf.ekfac(damping=0.1),
    "kpsvd": lambda: kf.kpsvd(damping=0.1),
    "deflation": lambda: kf.deflation(damping=0.1),
    "corrected": lambda: kf.corrected(damping=0.1),
    "lanczos": lambda: kf.lanczos(damping=0.1),
    "inverse_free": lambda: kf.inverse_free(damping=0.1),
    "natural gradient": lambda: kf.exact_natural_gradient(damping=0.1),
    "natural gradient by block": lambda: kf.exact_natural_gradient(True, damping=0.1),
    "two_level": lambda: kf.two_level_kfac(damping=0.1),
}


def step_of(look: Look, estimator: Any, **options: Any) -> Any:
    problem = look.case.problem
    return kf.value_grad_and_stats(problem.fn, problem.loss, estimator=estimator, **look.case.options, **options)


def taken(look: Look, estimator: Any, **options: Any) -> tuple[Tensor, Any, Any]:
    run = step_of(look, estimator, **options)
    look.seeded()
    return run(look.case.problem.params, look.case.problem.batch, generator=look.generator())


def fair(look: Look) -> None:
    """Raise Pointless where the numbers of two runs, or of two precisions, cannot agree."""
    if look.case.traits & {"random", "half", "rough"}:
        raise Pointless

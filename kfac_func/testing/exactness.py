r"""Whether a structure is the block that it approximates, and whether a layer kind is the layer that it stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, explain
from kfac_func.blocks import Block, Kind, pack
from kfac_func.curvature import Batch, Curvature, Structure, blockwise
from kfac_func.testing.dense import dense_ggn
from kfac_func.testing.kinds import check_kind
from kfac_func.testing.regimes import Regime
from kfac_func.testing.regimes import regime as named
from kfac_func.testing.setting import Setting, compare, set_up


def assert_exact(
    subject: Structure | Curvature | Kind | str,
    regime: str | Regime | None = None,
    *,
    solve: bool = True,
    damping: float = 0.03,
    tolerance: float = 1e-8,
) -> None:
    r"""Pass silently where `subject` is exact, else raise AssertionError with the largest difference and its place.

        structure    dense(state) = F_l        (F_l + λ I) solve(factorize(state, λ, "exact"), u) = u
        kind         Σ_s g[s] ā[s]ᵀ = V_n      gradient = Σ_n V_n      moment = Σ_{n,s} ā āᵀ

    subject    a structure or curvature; a layer kind, which replaces the one of its name that capture found; or the
               name of a kind
    regime     a name of `regimes()`, or a `Regime` of your own. A name alone, `assert_exact("conv2d")`, checks every
               block of the regime of that name
    solve      False: leave out the inverse of structures that only know factored damping ("pi", "none")
    damping    λ of that inverse, in units of F
    tolerance  the largest difference that passes, relative to the largest entry of the truth

    F_l is the block of `dense_ggn`, V_n the gradient of an output vector and example by differentiation of the whole
    model; the state is that of one batch with the exact output vectors. A structure is checked on the blocks that the
    regime is about and that it can take. A curvature that couples blocks (`full()`) must solve for all of them
    together, (F + λ I) v = u; any other for each on its own. Kinds are checked with every position ("expand").

    Raises HyperparameterError for an unknown regime and for one that does not have what is to be checked, or has uses
    that all examples share; the errors of `make_plan`. Source of the regimes: see `regimes`.

        >>> kf.testing.assert_exact(kf.curvature.kronecker(), "deep_linear")
        >>> kf.testing.assert_exact(kf.curvature.full(), "any")
        >>> kf.testing.assert_exact("conv2d")
        >>> try:
        ...     kf.testing.assert_exact(kf.curvature.diagonal(), "deep_linear")
        ... except AssertionError as error:
        ...     print(str(error).splitlines()[0])
        diagonal is not exact for block 'one' in regime 'deep_linear'.
    """
    alone = regime is None and isinstance(subject, str)
    at = subject if alone else regime
    if not isinstance(at, (str, Regime)):
        raise HyperparameterError(
            explain("assert_exact needs a regime.", options="a name of kf.testing.regimes(), or a Regime of your own")
        )
    given, name = (at, "the given regime") if isinstance(at, Regime) else (named(at), f"regime {at!r}")
    if isinstance(subject, (Structure, Curvature)):
        _check(subject, set_up(given, name, tolerance), damping if solve else None)
    else:
        check_kind(None if alone else subject, set_up(given._replace(sharing="expand"), name, tolerance))


def _check(subject: Structure | Curvature, setting: Setting, damping: float | None) -> None:
    blocks, regime = _claimed(subject, setting), setting.regime
    curvature = blockwise(subject, subject) if isinstance(subject, Structure) else subject
    truth = dense_ggn(regime.fn, regime.loss, regime.params, regime.batch)
    levels: dict[str, Tensor] = {name: truth.new_tensor(1.0 if damping is None else damping) for name in blocks}
    split = "pi" if damping is None else "exact"
    state = _first_state(curvature, blocks, levels, split)
    for name, got in curvature.dense(state).items():
        who, rows = f"{subject.name} is not exact for block {name!r}", setting.problem.wanted[name]
        compare(setting, who, "dense(state) = F_l, the block of dense_ggn", got, truth[rows][:, rows])
    if damping is not None:
        factored = curvature.factorize(state, levels, split, ())
        _check_solve(subject.name, curvature, factored, _damped(truth, damping), setting, blocks)


def _claimed(subject: Structure | Curvature, setting: Setting) -> dict[str, Block]:
    """The blocks that the regime is about and that the structure can take."""
    matrix = isinstance(subject, Structure) and subject.matrix
    wanted = setting.regime.blocks or tuple(setting.blocks)
    missing = [name for name in wanted if name not in setting.blocks]
    fit = {n: block for n, block in setting.blocks.items() if block.layout.matrix or not matrix}
    found = {n: block for n, block in fit.items() if n in wanted and not block.layout.empty}
    if missing or not found:
        raise HyperparameterError(
            explain(
                f"{setting.name} does not have the blocks that {subject.name} is to be checked on.",
                got=", ".join(map(repr, setting.blocks)),
                wanted=", ".join(map(repr, missing)) or "a matrix block",
                options="blocks are named by the path of their weight",
            )
        )
    return found


def _first_state(curvature: Curvature, blocks: dict[str, Block], damping: dict[str, Tensor], split: str) -> Any:
    """The state after one batch with all periods due."""
    prepared, whole = curvature.prepare(blocks), next(iter(damping.values())).new_ones(())

    batch = Batch(curvature.measure(prepared), lambda question: question(prepared))
    state = curvature.refresh(curvature.absorb((), batch, whole), damping, split)
    return curvature.scale(state, batch, whole)


def _damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _check_solve(
    who: str, curvature: Curvature, factored: Any, damped: Tensor, setting: Setting, blocks: dict[str, Block]
) -> None:
    """(F + λ) v = u, for all blocks together where they are coupled, else block by block."""
    index = setting.problem.wanted
    leaves = _tree.unique_paths(setting.regime.params)
    v = {name: torch.zeros_like(pack(block.layout, leaves)) for name, block in blocks.items()}
    generator = torch.Generator().manual_seed(0)
    u = {name: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for name, x in v.items()}
    first = next(iter(blocks))
    alone = curvature.solve(factored, v | {first: u[first]})
    coupled = any(bool(alone[name].any()) for name in blocks if name != first)
    solved = curvature.solve(factored, u)
    for names in [list(blocks)] if coupled else [[name] for name in blocks]:
        rows = torch.cat([index[name] for name in names])
        got = damped[rows][:, rows] @ torch.cat([solved[name].flatten() for name in names])
        blamed = f"the inverse of {who} is not exact for block{'s' if coupled else ''} {', '.join(map(repr, names))}"
        compare(setting, blamed, "(F + λ) solve(u) = u", got, torch.cat([u[name].flatten() for name in names]))

"""The optimisers of four published codes as chains, with their defaults and their options, right where they were wrong.

    thrandis      EKFAC-pytorch         kfac → (unit norm)        → add_decayed_weights → trace → rate
    koroko        natural-gradients     kfac → (clip, no rate)    → add_decayed_weights → trace → rate
    tselepidis    KFAC-Pytorch          kfac → clip_by_kl(rate)   → add_decayed_weights → trace → rate
    n_gao         pytorch-kfac          kfac → clip_by_kl(rate)   → trace → add_decayed_weights → rate
                  "adam"                trace → kfac → clip_by_kl → add_decayed_weights → rate

Statistics are the user's in all of them: the codes take them every T_cov steps (pass `stats=` then, None otherwise), of
targets drawn from the model where they are right. What the codes get wrong is not repeated: each docstring says where.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from kfac_func import curvature as structures
from kfac_func._errors import HyperparameterError, explain
from kfac_func._typing import ScalarOrSchedule
from kfac_func.control import Adaptive, QuadraticModel, adapt_damping, levenberg_marquardt
from kfac_func.curvature import Curvature, Structure
from kfac_func.curvature.coarse import CoarseSpace, Resample
from kfac_func.damping import Split
from kfac_func.precondition.settings import link
from kfac_func.recipes.structures import exact_natural_gradient
from kfac_func.transforms import (
    GradientTransformation,
    add_decayed_weights,
    chain,
    clip_by_kl,
    normalize_by_fisher_norm,
    scale_by_learning_rate,
    trace,
)


def thrandis(
    learning_rate: ScalarOrSchedule,
    *,
    damping: float,
    method: Literal["kfac", "ekfac"] = "kfac",
    sua: bool = False,
    pi: bool = False,
    update_freq: int = 1,
    alpha: float | None = None,
    ra: bool = False,
    constraint_norm: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> GradientTransformation:
    """EKFAC-pytorch: `kfac → (normalize_by_fisher_norm) → add_decayed_weights → trace → rate`; the last three stand for
    the torch optimiser around it.

    damping, sua, pi, update_freq, ra, constraint_norm   theirs (`eps` is the damping); pi and constraint_norm are of
                                                         "kfac", ra is of "ekfac"
    alpha            of "kfac": the weight of the NEW statistics, default 1; of "ekfac" with ra: of the OLD ones,
                     default .75. As theirs: the two differ

    Unlike theirs: EKFAC preconditions the gradient that it is given and runs with its defaults; SUA works for both,
    with the bias counted once; with ra the bases come from averages too. Raises HyperparameterError for options of the
    other method.

        >>> tx = kf.recipes.thrandis(0.1, damping=0.1, method="ekfac", update_freq=100)
    """
    _known("method", method, ("kfac", "ekfac"))
    _only(method == "kfac", "method='ekfac'", pi=pi, constraint_norm=constraint_norm)
    _only(method == "ekfac", "method='kfac'", ra=ra)
    _only(method == "kfac" or ra, "method='ekfac' without ra", alpha=alpha is not None)
    periods: dict[str, Any] = {"damping": damping, "refresh_every": update_freq, "growing": False}
    if method == "kfac":
        decay, split = 1 - (1.0 if alpha is None else alpha), "pi" if pi else "none"
        first = link(structures.kronecker(sua=sua), split=split, decay=decay, average="constant", **periods)
    else:
        decay = (0.75 if alpha is None else alpha) if ra else 0.0
        structure = structures.eigen("mean_gradient" if ra else "intra_batch", sua=sua)
        first = link(structure, decay=decay, average="constant", **periods)
    unit = [normalize_by_fisher_norm()] if constraint_norm else []
    return chain(first, *unit, *_outer(learning_rate, momentum, weight_decay))


def tselepidis(
    learning_rate: ScalarOrSchedule = 1e-3,
    *,
    method: Literal["kfac", "ekfac", "gkfac"] = "kfac",
    momentum: float = 0.9,
    stat_decay: float = 0.95,
    damping: float = 1e-3,
    kl_clip: float = 1e-3,
    weight_decay: float = 0.0,
    t_inv: int = 100,
    t_scal: int | None = None,
    solver: Literal["symeig", "approx"] = "symeig",
    omega: tuple[float, float] = (1.0, 1.0),
    mode: Resample = "nearest",
) -> GradientTransformation:
    """KFAC-Pytorch: `kfac → clip_by_kl(rate) → add_decayed_weights → trace → rate`; two-level K-FAC is "gkfac".

    t_inv, t_scal    refresh and scalings (of "ekfac", default 10); T_cov is how often statistics are passed (10)
    solver           "symeig": exact damping, "approx": factored with π; of "kfac" and "gkfac"
    omega, mode      of "gkfac": the weights (ω₁, ω₂) of the two levels and how maps of different size are matched

    Unlike theirs: stat_decay counts, the scalings are taken in the right basis and outlive a refresh, the coarse matrix
    does not grow, weight decay is on from the first step. All leaves get momentum, decay and the clip alike. Raises
    HyperparameterError for options of another method.

        >>> tx = kf.recipes.tselepidis(1e-2, method="gkfac", solver="approx")
    """
    _known("method", method, ("kfac", "ekfac", "gkfac"))
    _known("solver", solver, ("symeig", "approx"))
    _only(method == "ekfac", f"method={method!r}", t_scal=t_scal is not None)
    _only(method == "gkfac", f"method={method!r}", omega=omega != (1.0, 1.0), mode=mode != "nearest")
    _only(method != "ekfac", "method='ekfac'", solver=solver != "symeig")
    split: Split = "exact" if solver == "symeig" else "pi"
    settings: dict[str, Any] = {
        "damping": damping,
        "decay": stat_decay,
        "average": "warmup",
        "refresh_every": t_inv,
        "growing": False,
    }
    if method == "ekfac":
        first = link(structures.eigen(), scale_every=10 if t_scal is None else t_scal, **settings)
    elif method == "gkfac":
        coarse = structures.two_level(
            structures.kronecker(), "tselepidis", form="additive", weights=omega, resample=mode
        )
        first = link(coarse, split=split, **settings)
    else:
        first = link(structures.kronecker(), split=split, **settings)
    return chain(first, clip_by_kl(kl_clip, learning_rate), *_outer(learning_rate, momentum, weight_decay))


def n_gao(
    learning_rate: ScalarOrSchedule,
    *,
    damping: float,
    adaptive: QuadraticModel | None = None,
    damping_adaptation_decay: float = 0.99,
    damping_adaptation_interval: int = 5,
    include_damping_in_qmodel_change: bool = False,
    min_damping: float = 1e-8,
    cov_ema_decay: float = 0.95,
    momentum: float = 0.9,
    momentum_type: Literal["regular", "adam"] = "regular",
    norm_constraint: float | None = None,
    weight_decay: float = 0.0,
    center: bool = False,
    enable_pi_correction: bool = True,
) -> GradientTransformation | Adaptive:
    """pytorch-kfac: "regular" is `kfac → clip_by_kl(rate) → trace → add_decayed_weights → rate`, "adam" is
    `trace → kfac → clip_by_kl(rate) → add_decayed_weights → rate`. Inverses are made anew at every step.

    adaptive          in place of `adapt_damping=True`: the objective, `kf.quadratic_model(fn, loss, l2=l2_reg)`; then
                      update also needs `batch=`. The four options after it are of this rule
    norm_constraint   κ of clip_by_kl; None: no clip

    Unlike theirs: "adam" preconditions the momentum; ρ compares the losses of one batch with the exact model of the
    step that was taken; convolutions count every example. Raises HyperparameterError for options of a rule that is off.

        >>> tx = kf.recipes.n_gao(9e-3, damping=1e-3, momentum=0.95, norm_constraint=1e-3)
    """
    _known("momentum_type", momentum_type, ("regular", "adam"))
    rule = levenberg_marquardt(
        damping_adaptation_interval,
        damping_adaptation_decay,
        min=min_damping,
        damping_in_model=include_damping_in_qmodel_change,
    )
    _only(
        adaptive is not None,
        "adaptive=None",
        damping_adaptation_decay=damping_adaptation_decay != 0.99,
        damping_adaptation_interval=damping_adaptation_interval != 5,
        include_damping_in_qmodel_change=include_damping_in_qmodel_change,
        min_damping=min_damping != 1e-8,
    )
    split: Split = "pi" if enable_pi_correction else "none"
    structure = structures.kronecker(centred=center)
    first = [link(structure, damping=damping, split=split, decay=cov_ema_decay, refresh_every=1)]
    if norm_constraint is not None:
        first.append(clip_by_kl(norm_constraint, learning_rate))
    heavy = [trace(momentum)] if momentum else []
    decay = [add_decayed_weights(weight_decay)] if weight_decay else []
    members = [*heavy, *first, *decay] if momentum_type == "adam" else [*first, *heavy, *decay]
    whole = chain(*members, scale_by_learning_rate(learning_rate))
    return whole if adaptive is None else adapt_damping(whole, rule, model=adaptive)


Method = Literal["kfac", "kpsvd", "deflation", "corrected", "lanczos", "two_level", "ng", "ng_bd"]


def koroko(
    learning_rate: ScalarOrSchedule,
    *,
    method: Method = "kfac",
    damping: float = 1e-3,
    pi: bool = False,
    t_inv: int | None = None,
    alpha: float = 0.95,
    clipping: float | None = 1e-2,
    coarse_space: CoarseSpace = "nicolaides",
    krylov: bool = False,
    radius: int | None = None,
    heuristic: bool = False,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
) -> GradientTransformation:
    """natural-gradients: `kfac → clip → add_decayed_weights → trace → rate`, for all its structures.

    method            "ng" and "ng_bd" are the exact natural gradient, of all layers and layer by layer
    pi, t_inv, alpha  theirs; T_cov is how often statistics are passed (theirs: 100); the weight of the old average is
                      min(1 − 1/k, alpha) at the k-th statistics. t_inv is 100 unless given, but 1 of the exact ones,
                      which use the newest batch alone
    clipping          κ of ν = min(1, √(κ / ⟨v, g⟩)), as in its scripts without the rate; None: no clip
    coarse_space, krylov   of "two_level" (exact damping)     radius   of positions, of the structures after "kfac"
    heuristic         of "ng" and "ng_bd": λ_h = λσ₁(A) + λσ₁(G) + λ²

    Unlike theirs: the curvature is refreshed, deflation deflates, the coarse right-hand side is the residual (the
    additive form for "tselepidis"), convolutions are scaled right, all layers see the same examples. Raises
    HyperparameterError for options of another method.

        >>> tx = kf.recipes.koroko(1e-2, method="two_level", coarse_space="residual", krylov=True)
    """
    _known("method", method, get_args(Method))
    exact = method in ("ng", "ng_bd")
    _only(method in ("kfac", "kpsvd"), f"method={method!r}", pi=pi)
    _only(method == "two_level", f"method={method!r}", coarse_space=coarse_space != "nicolaides", krylov=krylov)
    _only(method in ("kpsvd", "deflation", "corrected", "lanczos"), f"method={method!r}", radius=radius is not None)
    _only(exact, f"method={method!r}", heuristic=heuristic)
    _only(not exact, f"method={method!r}", alpha=alpha != 0.95)
    every = (1 if exact else 100) if t_inv is None else t_inv
    periods: dict[str, Any] = {"damping": damping, "refresh_every": every, "growing": False}
    if exact:
        rule = "heuristic" if heuristic else "standard"
        first = exact_natural_gradient(method == "ng_bd", rule=rule, **periods)
    else:
        split: Split = "exact" if method == "two_level" else "pi" if pi else "none"
        structure = _koroko_structure(method, coarse_space, krylov, radius)
        first = link(structure, split=split, decay=alpha, average="warmup", **periods)
    clip = [] if clipping is None else [clip_by_kl(clipping, 1.0)]
    return chain(first, *clip, *_outer(learning_rate, momentum, weight_decay))


def _koroko_structure(
    method: str, coarse_space: CoarseSpace, krylov: bool, radius: int | None
) -> Structure | Curvature:
    if method == "two_level":
        form = "additive" if coarse_space == "tselepidis" else "residual"
        return structures.two_level(structures.kronecker(), coarse_space, form=form, krylov=krylov)
    if method == "kfac":
        return structures.kronecker()
    sums = {
        "kpsvd": structures.kpsvd,
        "deflation": structures.deflation,
        "corrected": structures.corrected,
        "lanczos": structures.lanczos,
    }
    return sums[method](radius=radius)


def _outer(learning_rate: ScalarOrSchedule, momentum: float, weight_decay: float) -> list[GradientTransformation]:
    """The torch SGD of the codes, without dampening: decay, momentum, rate."""
    decay = [add_decayed_weights(weight_decay)] if weight_decay else []
    heavy = [trace(momentum)] if momentum else []
    return [*decay, *heavy, scale_by_learning_rate(learning_rate)]


def _known(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise HyperparameterError(explain(f"unknown {name}.", got=repr(value), wanted=" or ".join(map(repr, choices))))


def _only(allowed: bool, setting: str, **options: bool) -> None:
    """Refuse options that were set although the setting leaves them without meaning."""
    for name, given in options.items():
        if given and not allowed:
            raise HyperparameterError(
                explain(
                    f"{name} and {setting} contradict each other.",
                    options=f"leave out {name}; or change {setting.split('=')[0]}",
                )
            )

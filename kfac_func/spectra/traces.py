"""Trace and diagonal of an operator, from products with random vectors."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kfac_func._errors import at_least
from kfac_func._tree import tree_map
from kfac_func._typing import Progress, PyTree, shown
from kfac_func.linalg.randomized import Estimate, estimate, hutch_pp, quadratic_forms, xtrace
from kfac_func.spectra.flat import Flat, MatVec, flattened, known

Method = Literal["hutchinson", "hutch++", "xtrace"]


def trace(
    matvec: MatVec,
    like: PyTree,
    *,
    generator: torch.Generator,
    method: Method = "hutch++",
    products: int = 60,
    chunk_size: int | None = 1,
    progress: Progress | None = None,
) -> Estimate:
    r"""The trace of an operator.

        hutchinson  mean of ω_iᵀ A ω_i                                              m signs ω_i
        hutch++     tr(QᵀAQ) + mean of g_iᵀ (I − QQᵀ) A (I − QQᵀ) g_i               ⌊m/3⌋ signs Ω, m − 2⌊m/3⌋ signs g_i
                    Q = orth(AΩ)
        xtrace      mean of tr(Q_iᵀAQ_i) + (P − k + 1) r_iᵀ A r_i / ‖r_i‖²          k = ⌊m/2⌋ normal ω_i
                    Q_i = orth(A ω_j, j ≠ i),   r_i = (I − Q_iQ_iᵀ) ω_i

    matvec      v -> A v on trees like the parameters; P entries in all, units of A; may be unsymmetric
    like        the parameters, or any tree with their structure, shapes, dtypes and devices (values are not used)
    generator   draws the probes, on its own device
    products    m ≥ 4, how often A is applied at most; ⌊m/3⌋ and ⌊m/2⌋ are cut to P
    chunk_size  products under one torch.func.vmap; 1 loops without it, None takes all at once
    progress    wraps the loops over chunks, as `tqdm.tqdm` does: one for hutchinson, three for hutch++, two for xtrace

    Returns the estimate and its standard error, 0-dim, in units of A. All three are unbiased. Hutchinson's error falls
    like m^-½, with one chunk in memory; those of the others like 1/m or faster where the eigenvalues decay, and they
    are exact where the rank is at most ⌊m/3⌋ (hutch++) or below ⌊m/2⌋ (xtrace), with some m P numbers in memory.
    xtrace is the best of the three for most spectra; its error estimate treats the exchangeable samples as independent.
    Differentiable through the products.

    Raises HyperparameterError for an unknown method, products < 4, chunk_size < 1, products that are not finite and a
    `like` without parameters; TreeMismatchError where matvec returns another tree.
    Sources: Hutchinson 1989; Meyer, Musco, Musco & Woodruff 2021 (2010.09649), Algorithm 1; Epperly, Tropp & Webber
    2024 (2301.07825), §§2.1-2.3.

        >>> like, scales = {"w": torch.zeros(3)}, torch.tensor([1.0, 2.0, 3.0])
        >>> found = kf.spectra.trace(
        ...     lambda v: {"w": scales * v["w"]}, like, method="xtrace", generator=torch.Generator().manual_seed(0)
        ... )
        >>> round(float(found.value), 4), float(found.error) < 1e-4
        (6.0, True)
    """
    known("method", method, get_args(Method))
    at_least(4, products=products)
    if method == "hutchinson":
        return estimate(_hutchinson(flattened(matvec, like, generator, chunk_size), products, progress))
    flat = flattened(matvec, like, generator, chunk_size, progress)
    if method == "xtrace":
        return estimate(xtrace(flat.products, flat.normals(min(products // 2, flat.size))))
    sketch = min(products // 3, flat.size)
    return estimate(hutch_pp(flat.products, flat.signs(sketch), flat.signs(products - 2 * sketch)))


def _hutchinson(flat: Flat, products: int, progress: Progress | None) -> Tensor:
    counts = shown(flat.parts(products), progress)
    return torch.cat([quadratic_forms(flat.products, flat.signs(count)) for count in counts])


def diagonal(
    matvec: MatVec,
    like: PyTree,
    *,
    generator: torch.Generator,
    products: int = 60,
    chunk_size: int | None = 1,
    progress: Progress | None = None,
) -> Estimate:
    r"""The diagonal of an operator.

        d = mean of ω_i ∘ A ω_i,   ω_i = ±1,   E d = diag A,   variance Σ_{q≠p} A_pq² / m for entry p (A symmetric)

    products    m ≥ 2, how often A is applied
    The other arguments are those of `trace`.

    Returns trees like the parameters: the estimate and its standard error, in units of A. Exact for a diagonal A.
    Differentiable through the products.

    Raises HyperparameterError for products < 2, chunk_size < 1, products that are not finite and a `like` without
    parameters; TreeMismatchError where matvec returns another tree.
    Source: Bekas, Kokiopoulou & Saad 2007, An estimator for the diagonal of a matrix, §2.

        >>> like, scales = {"w": torch.zeros(3)}, torch.tensor([1.0, 2.0, 3.0])
        >>> found = kf.spectra.diagonal(
        ...     lambda v: {"w": scales * v["w"]}, like, generator=torch.Generator().manual_seed(0)
        ... )
        >>> found.value["w"], found.error["w"]
        (tensor([1., 2., 3.]), tensor([0., 0., 0.]))
    """
    at_least(2, products=products)
    flat = flattened(matvec, like, generator, chunk_size)
    seen = 0
    mean = spread = torch.zeros(())
    for count in shown(flat.parts(products), progress):
        probes = flat.signs(count)
        new = probes * flat.products(probes)
        seen += count
        step = new.mean(0) - mean  # sums of squares joined as by Chan, Golub & LeVeque 1979, without cancellation
        spread = spread + (new - new.mean(0)).square().sum(0) + step.square() * (count * (seen - count) / seen)
        mean = mean + step * (count / seen)
    error = (spread / ((seen - 1) * seen)).sqrt()
    value, error = (tree_map(lambda x: x[0], flat.tree(x.unsqueeze(0))) for x in (mean, error))
    return Estimate(value, error)

"""Figures of states and runs: eigenvalues, factors, angles of updates, densities. A function returns a figure, writes
no file and touches no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._typing import PyTree
from kfac_func.blocks import densify
from kfac_func.diagnostics.parts import Parts
from kfac_func.diagnostics.plots import (
    STYLES,
    Figure,
    clean,
    legend,
    line_styles,
    new_figure,
    something,
    whole_numbers,
)
from kfac_func.diagnostics.states import Spectrum, factors
from kfac_func.diagnostics.steps import Summary
from kfac_func.spectra import SpectralDensity


def spectrum_plot(spectra: Mapping[str, Spectrum], *, title: str = "") -> Figure:
    r"""The eigenvalues of A, of G and of every block, from the largest down, on logarithmic axes: one line per block.

    spectra    by block, as `kf.diagnostics.spectra` gives them; all groups of a grouped layer are in one line

    A and G are in units of their own (their product has those of the curvature); blocks without factors are in the last
    panel alone. What is likely to be rounding is left out: factors below d ε λ_max and blocks below ε λ_max, with ε of
    their dtype; so is a block of zeros.
    Beyond 7 blocks colours go by the order of the network. Returns the figure, and touches no global state. Raises
    HyperparameterError without a block, ImportError without matplotlib.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, [(torch.eye(3), torch.zeros(3, 2))])
        >>> [len(axes.lines) for axes in kf.diagnostics.spectrum_plot(kf.diagnostics.spectra(state)).axes]
        [1, 1, 1]
    """
    something(spectra, "no spectra", "kf.diagnostics.spectra(state) of a state with statistics")
    figure = new_figure(12, 4.2)
    panels = (
        ("a", "A: inputs", "eigenvalue [input²]"),
        ("g", "G: output gradients", "eigenvalue [loss per output²]"),
        ("block", "F̂: block, without damping", "eigenvalue [loss per parameter²]"),
    )
    styles = line_styles(list(spectra))
    for axes, (part, name, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        for block, one in spectra.items():
            values = getattr(one, part)
            curve = _visible(values, 1 if part == "block" else values.shape[-1]) if isinstance(values, Tensor) else []
            if curve:
                axes.plot(range(1, len(curve) + 1), curve, marker="." if len(curve) == 1 else None, **styles[block])
        axes.set(xscale="log", yscale="log", title=name, xlabel="index, largest first", ylabel=unit)
        clean(axes)
    legend(figure, styles)
    figure.suptitle(title)
    return figure


def factor_heatmaps(state: PyTree, block: str, *, group: int = 0, title: str = "") -> Figure:
    r"""|correlation| of the inputs and of the output gradients of a block, as two images: how far A and G are from
    diagonal.

        |A_ij| / √(A_ii A_jj)        0 where an input is dead; about the origin, not about the mean

    block    its name in the state; the last input of a layer with a bias is the constant 1
    group    of a grouped layer

    Raises HyperparameterError for a block without factors and a group that does not exist, ImportError without
    matplotlib, and what `kf.diagnostics.factors` raises.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, [(torch.eye(3), torch.zeros(3, 2))])
        >>> [axes.images[0].get_array().shape for axes in kf.diagnostics.factor_heatmaps(state, "weight").axes[:2]]
        [(4, 4), (2, 2)]
    """
    found = factors(state)
    if block not in found:
        raise HyperparameterError(
            explain(
                f"block {block!r} has no Kronecker factors.",
                got=repr(block),
                wanted=", ".join(map(repr, list(found)[:20])) or "a curvature with factors, such as eigen()",
            )
        )
    a, g = (_correlation(densify(side), group) for side in found[block][:2])
    figure = new_figure(9.6, 4.4)
    panels = (a, "A: inputs", "input"), (g, "G: output gradients", "output")
    for axes, (image, name, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.imshow(image, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axes.set(title=f"{name} [{len(image)}, {len(image)}]", xlabel=unit, ylabel=unit)
        whole_numbers(axes)
    figure.colorbar(figure.axes[0].images[0], ax=figure.axes, label="|correlation|", shrink=0.85)
    figure.suptitle(title or block)
    return figure


def cosine_plot(summaries: Sequence[Summary], *, title: str = "") -> Figure:
    """The course of a run over the steps: norms in all, and the cosine of updates and gradients in all and by block.

    summaries    one per step that was looked at, all with grads and updates, as `kf.diagnostics.summary` gives them

    Norms are in units of the parameters (updates) and of the loss per parameter (gradients). Returns the figure. Raises
    HyperparameterError without a summary, or for one without grads or updates; ImportError without matplotlib.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, [(torch.eye(3), torch.zeros(3, 2))])
        >>> seen = kf.diagnostics.summary(state, params, grads=params, updates=params)
        >>> [len(axes.lines) for axes in kf.diagnostics.cosine_plot([seen, seen]).axes]
        [3, 3]
    """
    something(summaries, "no summary", "a list of kf.diagnostics.summary(state, params, grads, updates), one per step")
    for index, one in enumerate(summaries):
        if not isinstance(one.cosine, Parts):
            raise HyperparameterError(
                explain(
                    f"summary {index} has no cosine.",
                    why="it was taken without grads or updates",
                    options="kf.diagnostics.summary(state, params, grads, updates)",
                )
            )
    steps = [int(one.step) for one in summaries]
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    styles = line_styles(list(summaries[0].cosine.parts))
    right.axhline(0, color="#777777", linewidth=1, linestyle=":")
    for block, style in styles.items():
        thin = style | {"linewidth": 1, "alpha": 0.8}
        right.plot(steps, [float(one.cosine.parts[block]) for one in summaries], **thin)
    whole: dict[str, Any] = {"color": "#000000", "linewidth": 2.5, "label": "all"}
    right.plot(steps, [float(one.cosine.total) for one in summaries], **whole)
    right.set(xlabel="steps", ylabel="cosine of update and gradient", ylim=(-1.05, 1.05))
    units = {"params": "parameters", "updates": "updates [parameters]", "grads": "gradients [loss per parameter]"}
    for k, (name, label) in enumerate(units.items()):
        sizes = [float(getattr(one, name).total) for one in summaries]
        left.plot(steps, sizes, color="#000000", linestyle=STYLES[k], linewidth=1.6, label=label)
    left.set(xlabel="steps", ylabel="Euclidean norm", yscale="log")
    left.legend(loc="best", facecolor="white", framealpha=0.8, edgecolor="none", fontsize=8)
    for axes in (left, right):
        clean(axes)
    legend(figure, {"all": whole} | styles)
    figure.suptitle(title)
    return figure


def density_plot(densities: Mapping[str, SpectralDensity], *, title: str = "") -> Figure:
    """Spectral densities of operators, by label, over the eigenvalue, on a logarithmic axis of density.

    densities    as `kf.spectra.spectral_density` gives them

    A density is per unit of eigenvalue, and so in the inverse units of the operator. What lies more than six decades
    below the highest point is left out. Returns the figure. Raises HyperparameterError without a density, ImportError
    without matplotlib.

        >>> like = {"w": torch.zeros(4)}
        >>> found = kf.spectra.spectral_density(
        ...     lambda v: v, like, generator=torch.Generator().manual_seed(0), width=0.1
        ... )
        >>> len(kf.diagnostics.density_plot({"identity": found}).axes[0].lines)
        1
    """
    something(densities, "no density", "{label: kf.spectra.spectral_density(...)}")
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    highest = max(float(one.density.max()) for one in densities.values())
    styles = line_styles(list(densities))
    for label, one in densities.items():
        density = torch.where(one.density > 1e-6 * highest, one.density.double(), torch.nan)
        axes.plot(one.grid.tolist(), density.tolist(), **styles[label])
    axes.set(yscale="log", xlabel="eigenvalue", ylabel="density of eigenvalues [1/eigenvalue]")
    clean(axes)
    legend(figure, styles)
    figure.suptitle(title)
    return figure


def _visible(values: Tensor, rounded: int) -> list[float]:
    """From the largest down, without what is below so many roundings of the largest."""
    numbers = values.detach().double().flatten().sort(descending=True).values
    return numbers[numbers > rounded * torch.finfo(values.dtype).eps * numbers[0]].tolist()


def _correlation(matrix: Tensor, group: int) -> list[list[float]]:
    matrices = matrix.detach().double().reshape(-1, *matrix.shape[-2:])
    if not 0 <= group < len(matrices):
        raise HyperparameterError(
            explain("there is no such group.", got=group, wanted=f"a number in [0, {len(matrices)})")
        )
    one = matrices[group]
    size = one.diagonal().clamp(min=0).sqrt()
    scale = torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 0.0)
    return (one * scale * scale.unsqueeze(-1)).abs().clamp(max=1).tolist()

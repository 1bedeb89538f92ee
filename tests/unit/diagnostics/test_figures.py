"""Figures: they show the numbers that they were given, and nothing where there is nothing."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_func as kf
from kfac_func._errors import HyperparameterError, StateError
from kfac_func.blocks import densify
from tests.zoo import CASES, run

C, D = kf.curvature, kf.diagnostics


@cache
def observed(net: str = "tokens", structure: str = "eigen") -> Any:
    case = CASES[net]
    tx = kf.kfac(getattr(C, structure)(), damping=0.3)
    return kf.observe(tx.init(case.params), run(case)[2])


@cache
def deep(blocks: int) -> Any:
    layers = [layer for _ in range(blocks) for layer in (nn.Linear(3, 3), nn.Tanh())]
    fn, params = kf.make_functional(nn.Sequential(*layers))
    return kf.fit_curvature(fn, kf.losses.mse(), params, [(torch.eye(3), torch.zeros(3, 3))]), params


def titles(figure: Any) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def names(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# ------------------------------------------------------------------ spectra


def test_a_spectrum_plot_has_a_line_per_block_and_shows_its_eigenvalues():
    spectra = D.spectra(observed())
    figure = D.spectrum_plot(spectra, title="tokens")
    a, g, block = figure.axes
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 3]  # the norm has no factors
    assert names(figure) == list(spectra)
    for axes, part in ((a, "a"), (g, "g"), (block, "block")):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_ylabel().startswith("eigenvalue [")
        for line in axes.lines:
            values = getattr(spectra[line.get_label()], part).flip(-1)
            shown = torch.tensor(line.get_ydata(), dtype=torch.float64)
            assert torch.equal(shown, values[: len(shown)])
            assert (values[len(shown) :] < 1e-12 * values[0]).all()
    assert figure.get_suptitle() == "tokens"


def test_rounding_is_not_shown_and_a_block_of_zeros_has_no_line():
    zero = torch.zeros(3)
    values = torch.tensor([1e-7, 2.0**-22, 1.0])  # ε is 2⁻²³: an eigh of three rows is no better than 3 ε
    figure = D.spectrum_plot({"one": D.Spectrum(values, (), values), "none": D.Spectrum(zero, zero, zero)})
    shown = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]
    assert shown == [[[1.0]], [], [[1.0, 2.0**-22]]]


def test_grouped_layers_are_one_line():
    spectra = D.spectra(observed("grouped"))
    (line,) = (line for line in D.spectrum_plot(spectra).axes[1].lines if line.get_label() == "conv.weight")
    assert len(line.get_ydata()) == spectra["conv.weight"].g.numel()


@pytest.mark.parametrize(("blocks", "shown"), [(5, 5), (20, 20), (40, 21)])
def test_many_blocks_have_colours_in_order_and_a_legend_that_fits(blocks: int, shown: int):
    figure = D.spectrum_plot(D.spectra(deep(blocks)[0]))
    lines = figure.axes[2].lines
    assert len(lines) == blocks == len({(str(line.get_color()), line.get_linestyle()) for line in lines})
    assert len(names(figure)) == shown
    assert names(figure)[0] == "0.weight"
    assert names(figure)[-1] == f"{2 * (blocks - 1)}.weight"


# ------------------------------------------------------------------ factors


@pytest.mark.parametrize(("net", "group"), [("conv", 0), ("grouped", 1)])
def test_heat_maps_show_absolute_correlations(net: str, group: int):
    state = observed(net)
    block = "conv.weight" if net == "grouped" else "second.weight"
    figure = D.factor_heatmaps(state, block, group=group)
    own = D.factors(state)[block]
    for axes, factor in zip(figure.axes, (own.a, own.g), strict=False):
        matrix = densify(factor).reshape(-1, *densify(factor).shape[-2:])[group]
        size = matrix.diagonal().sqrt()
        wanted = (matrix / torch.outer(size, size)).abs()
        shown = torch.as_tensor(axes.images[0].get_array().data)
        torch.testing.assert_close(shown, wanted, rtol=1e-12, atol=1e-12)
        assert axes.images[0].get_clim() == (0, 1)
    assert titles(figure)[0].startswith("A: inputs [")
    assert figure.axes[-1].get_ylabel() == "|correlation|"


def test_a_dead_input_has_no_correlation():
    fn, params = kf.make_functional(nn.Linear(3, 2, bias=False))
    state = kf.fit_curvature(fn, kf.losses.mse(), params, [(torch.tensor([[1.0, 0.0, 2.0]]), torch.zeros(1, 2))])
    shown = D.factor_heatmaps(state, "weight").axes[0].images[0].get_array().tolist()
    assert shown == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]


def test_blocks_without_factors_and_unknown_groups_are_refused():
    with pytest.raises(HyperparameterError, match=r"'norm\.weight' has no Kronecker factors(.|\n)*'head\.weight'"):
        D.factor_heatmaps(observed(), "norm.weight")
    with pytest.raises(HyperparameterError, match=r"no Kronecker factors(.|\n)*eigen\(\)"):
        D.factor_heatmaps(observed("mlp", "diagonal"), "first.w")
    with pytest.raises(HyperparameterError, match=r"no such group(.|\n)*\[0, 2\)"):
        D.factor_heatmaps(observed("grouped"), "conv.weight", group=2)
    with pytest.raises(StateError, match="no statistics"):
        D.factor_heatmaps(kf.kfac().init({"w": torch.ones(2)}), "w")


# ------------------------------------------------------------------ runs


def course(steps: int) -> list[Any]:
    case, found = CASES["mlp"], []
    tx = kf.chain(kf.kfac(C.eigen(), damping=0.3), kf.sgd(0.1))
    params, state = case.params, tx.init(case.params)
    for _ in range(steps):
        _, grads, stats = run(case._replace(params=params))
        updates, state = tx.update(grads, state, params, stats=stats)
        found.append(D.summary(state, params, grads, updates))
        params = kf.apply_updates(params, updates)
    return found


def test_a_cosine_plot_shows_the_numbers_of_the_summaries():
    summaries = course(3)
    figure = D.cosine_plot(summaries, title="run")
    norms, cosines = figure.axes
    assert norms.get_yscale() == "log"
    for line, part in zip(norms.lines, ("params", "updates", "grads"), strict=True):
        assert list(line.get_xdata()) == [1, 2, 3]
        assert list(line.get_ydata()) == [float(getattr(one, part).total) for one in summaries]
    shown = {line.get_label(): list(line.get_ydata()) for line in cosines.lines[1:]}
    assert shown.pop("all") == [float(one.cosine.total) for one in summaries]
    assert shown == {name: [float(one.cosine.parts[name]) for one in summaries] for name in ("first.w", "second.w")}
    assert names(figure) == ["all", "first.w", "second.w"]


def test_summaries_without_a_cosine_are_refused():
    one, two = course(2)
    with pytest.raises(HyperparameterError, match=r"summary 1 has no cosine(.|\n)*kf\.diagnostics\.summary"):
        D.cosine_plot([one, two._replace(cosine=())])


# ------------------------------------------------------------------ densities


def density(values: Tensor) -> Any:
    like = {"w": torch.zeros(len(values), dtype=torch.float64)}
    generator = torch.Generator().manual_seed(0)
    return kf.spectra.spectral_density(
        lambda v: {"w": values * v["w"]}, like, generator=generator, width=0.05, points=200, steps=4
    )


def test_a_density_plot_has_a_line_per_operator():
    densities = {"one": density(torch.arange(4.0).double()), "two": density(torch.ones(4).double())}
    (axes,) = D.density_plot(densities).axes
    assert [line.get_label() for line in axes.lines] == ["one", "two"]
    highest = max(float(one.density.max()) for one in densities.values())
    for line, one in zip(axes.lines, densities.values(), strict=True):
        shown = torch.as_tensor(line.get_ydata())
        kept = one.density > 1e-6 * highest
        assert torch.equal(shown[kept], one.density[kept])
        assert shown[~kept].isnan().all()
        assert torch.equal(torch.as_tensor(line.get_xdata()), one.grid)


# ------------------------------------------------------------------ manners


@pytest.mark.parametrize(
    ("plot", "empty", "way_out"),
    [
        (D.spectrum_plot, {}, r"kf\.diagnostics\.spectra\(state\)"),
        (D.cosine_plot, [], r"kf\.diagnostics\.summary"),
        (D.density_plot, {}, r"kf\.spectra\.spectral_density"),
    ],
    ids=["spectrum_plot", "cosine_plot", "density_plot"],
)
def test_nothing_to_plot_is_refused(plot: Any, empty: Any, way_out: str):
    with pytest.raises(HyperparameterError, match=rf"nothing to plot(.|\n)*{way_out}"):
        plot(empty)


def test_figures_are_matplotlib_figures_without_a_window_or_global_state(tmp_path: Any):
    from matplotlib.figure import Figure

    before = "matplotlib.pyplot" in sys.modules
    spectra, summaries = D.spectra(observed()), course(2)
    found = [
        D.spectrum_plot(spectra),
        D.factor_heatmaps(observed(), "head.weight"),
        D.cosine_plot(summaries),
        D.density_plot({"one": density(torch.ones(3).double())}),
    ]
    for k, figure in enumerate(found):
        assert type(figure) is Figure
        figure.savefig(tmp_path / f"{k}.png", dpi=40)
        assert (tmp_path / f"{k}.png").stat().st_size > 1000
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install"):
        D.spectrum_plot(D.spectra(observed()))

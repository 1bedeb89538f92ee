"""What passes `assert_exact`, and the mistakes that do not."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kfac_func as kf
from kfac_func.blocks import Diagonal, densify, kronecker_state
from kfac_func.curvature import Structure
from kfac_func.layers import broadcast, conv, conv_transpose, embedding, handlers, normalization
from kfac_func.layers.base import dense
from kfac_func.linalg import kron
from kfac_func.testing import assert_exact, regime, regimes
from tests.contracts.structures import ROWS
from tests.zoo import close, randn

C = kf.curvature
PRODUCT = ("deep_linear", "expand", "one_datum", "constant_inputs", "constant_gradients", "reduce_mean")
LAYERS = tuple(name for name in regimes() if name not in (*PRODUCT, "any"))
NORMS = (*(name for name in LAYERS if name.endswith("_norm")), "scale", "shift")
EXACT = {name: row for name, row in ROWS.items() if row.exact}


@pytest.mark.parametrize("name", PRODUCT)
@pytest.mark.parametrize("row", EXACT.values(), ids=list(EXACT))
def test_structures_in_their_regimes(row, name):
    assert_exact(row.structure, name, solve="exact" in row.splits)


@pytest.mark.parametrize("name", ["any", *LAYERS])
@pytest.mark.parametrize("subject", [C.block_diagonal(), C.full()], ids=lambda s: s.name)
def test_the_exact_structures_are_exact_everywhere(subject, name):
    assert_exact(subject, name)


@pytest.mark.parametrize("name", ["any", *(name for name in LAYERS if name not in NORMS)])
def test_kronecker_products_are_not_exact_beyond(name):
    for structure in (C.kronecker(), C.eigen(), C.kpsvd()):
        with pytest.raises(AssertionError, match=f"is not exact for block .* in regime '{name}'"):
            assert_exact(structure, name)


@pytest.mark.parametrize("structure", [C.identity(), C.diagonal()], ids=lambda s: s.name)
@pytest.mark.parametrize("name", PRODUCT)
def test_structures_that_are_exact_nowhere(structure, name):
    with pytest.raises(AssertionError):
        assert_exact(structure, name)


def test_a_curvature_of_several_structures():
    assert_exact(C.blockwise(C.kronecker()), "deep_linear")
    assert_exact(C.by_path({"one": C.eigen(), "**": C.kpsvd()}), "expand")
    assert_exact(C.blockwise(C.block_diagonal(), C.block_diagonal()), "any")
    with pytest.raises(AssertionError, match="block 'two'"):
        assert_exact(C.by_path({"one": C.eigen(), "**": C.diagonal()}), "expand")


def test_the_sharing_matters():
    for name, sharing in (("reduce_mean", "expand"), ("expand", "reduce")):
        with pytest.raises(AssertionError):
            assert_exact(C.kronecker(), regime(name)._replace(sharing=sharing))


def test_a_regime_is_about_its_blocks():
    for name in ("constant_inputs", "constant_gradients"):
        assert len(regime(name).blocks) == 1
        with pytest.raises(AssertionError):
            assert_exact(C.kronecker(), regime(name)._replace(blocks=()))


def test_a_regime_of_ones_own():
    """Piecewise linear, one example: K-FAC is the block; of two examples it is not."""
    fn, params = kf.make_functional(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double())
    x, y = randn(2, 3), randn(2, 2, seed=1)
    assert_exact(C.kronecker(), kf.testing.Regime(fn, params, (x[:1], y[:1]), kf.losses.mse()))
    with pytest.raises(AssertionError, match="in the given regime"):
        assert_exact(C.kronecker(), kf.testing.Regime(fn, params, (x, y), kf.losses.mse()))


def test_regimes_are_the_same_numbers_at_every_call():
    state = torch.get_rng_state()
    for name in regimes():
        one, two = regime(name), regime(name)
        assert all(torch.equal(one.params[k], two.params[k]) for k in one.params)
        assert all(leaf.dtype == torch.float64 for leaf in one.params.values())
    assert torch.equal(state, torch.get_rng_state())


def test_the_sizes_of_a_regime_cannot_be_confused():
    for name in ("deep_linear", "expand"):
        given = regime(name)
        sizes = {*given.params["one"].shape, given.params["one"].shape[1] + 1, given.params["two"].shape[0]}
        assert len(sizes | {len(given.batch[1])}) == 5 - (5 in {given.params["one"].shape[1] + 1})


# ------------------------------------------------------------------ structures with a mistake

K = C.kronecker()


def swapped(block):
    state = kronecker_state(block)
    return state._replace(a=state.g, g=state.a)


def without_positions(block):
    state = kronecker_state(block)
    return state._replace(positions=torch.ones_like(state.positions), kept=torch.ones_like(state.kept))


def without_examples(block):
    state = kronecker_state(block)
    return state._replace(g=state.g * block.examples)


def without_constant(block):
    state = kronecker_state(block)
    a = densify(state.a).clone()
    a[-1], a[:, -1] = 0, 0
    return state._replace(a=a)


def damping_scaled(state, damping, split):
    return K.factorize(state, 2 * damping, split)


def transposed(state):
    """dense = A ⊗ G, the order of column-major vec(V)."""
    t = state.positions
    return t * kron(state.a, state.g)


MUTANTS: dict[str, tuple[Structure, str]] = {
    "A and G swapped": (K._replace(measure=swapped), "deep_linear"),
    "T forgotten": (K._replace(measure=without_positions), "expand"),
    "1/N forgotten": (K._replace(measure=without_examples), "constant_gradients"),
    "the constant forgotten": (K._replace(measure=without_constant), "one_datum"),
    "order of vec": (K._replace(dense=transposed), "constant_inputs"),
    "damping doubled": (K._replace(factorize=damping_scaled), "reduce_mean"),
    "half a step": (K._replace(solve=lambda factored, v: K.solve(factored, v) / 2), "deep_linear"),
    "nearly": (K._replace(solve=lambda factored, v: K.solve(factored, v) * (1 + 1e-6)), "deep_linear"),
    "not a number": (K._replace(dense=lambda state: torch.nan * K.dense(state)), "deep_linear"),
    "another shape": (K._replace(dense=lambda state: K.dense(state)[1:, 1:]), "deep_linear"),
}


@pytest.mark.parametrize(("structure", "name"), MUTANTS.values(), ids=list(MUTANTS))
def test_a_mistake_in_a_structure_is_found(structure, name):
    assert_exact(K, name)
    with pytest.raises(AssertionError, match=f"is not exact for block .* in regime '{name}'"):
        assert_exact(structure, name)


def test_a_coupled_curvature_must_solve_for_all_blocks():
    """The identity of every block is added to what couples them."""
    full = C.full()

    def solve(factored, vs):
        return {name: v + 1e-3 * vs[name] for name, v in full.solve(factored, vs).items()}

    with pytest.raises(AssertionError, match=r"the inverse of full.* for blocks 'conv', 'scale', 'hidden', 'head'"):
        assert_exact(full._replace(solve=solve), "any")


def test_the_message_says_what_where_and_how_much():
    with pytest.raises(AssertionError) as error:
        assert_exact(C.kronecker(), "any")
    what, *lines = str(error.value).splitlines()
    assert what == "kronecker[cholesky] is not exact for block 'conv' in regime 'any'."
    assert [line.split()[0] for line in lines] == ["checked", "got", "wanted", "difference", "allowed", "claim"]
    assert lines[0].endswith("the block of dense_ggn")
    with pytest.raises(AssertionError, match=r"wanted   shape \[25, 25\]"):
        assert_exact(MUTANTS["another shape"][0], regime("deep_linear")._replace(blocks=("one",)))


def test_the_tolerance_decides():
    nearly = K._replace(solve=lambda factored, v: K.solve(factored, v) * (1 + 1e-6))
    assert_exact(nearly, "deep_linear", tolerance=1e-5)
    assert_exact(nearly, "deep_linear", solve=False)


def test_single_precision():
    given = regime("deep_linear")
    single = given._replace(
        params={k: v.float() for k, v in given.params.items()}, batch=tuple(x.float() for x in given.batch)
    )
    assert_exact(C.kronecker(), single, tolerance=1e-4)


# ------------------------------------------------------------------ layer kinds


@pytest.mark.parametrize("name", LAYERS)
def test_kinds_of_the_library(name):
    assert_exact(name)


def test_kinds_by_name_in_another_regime():
    for name in ("linear", "conv", "group_norm"):
        assert_exact(name, "any")
    assert_exact("linear", regime("reduce_mean"))  # kinds are about all positions, whatever the sharing


LINEAR = dense._replace(name="linear")
NORM = normalization.normalization._replace(name="layer_norm")
KINDS = {
    "conv2d": conv.conv,
    "conv_transpose2d": conv_transpose.conv_transpose,
    "embedding": embedding.embedding,
    "linear": LINEAR,
    "layer_norm": NORM,
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_as_values(name):
    assert_exact(KINDS[name], name)


CHANGES = {
    "doubled": lambda x: 2 * x,
    "turned": lambda x: x.flip(-1),
    "other positions": lambda x: x.flip(2),
    "nearly": lambda x: x * (1 + 1e-6),
    "diagonal": lambda x: Diagonal(x.values + 1),
}
KIND_MUTANTS = [
    ("linear", "rows", "doubled", "per-example"),
    ("linear", "gradient", "nearly", "gradient[v]"),
    ("linear", "moment", "nearly", "moment"),
    ("conv2d", "rows", "turned", "per-example"),
    ("conv2d", "output_rows", "other positions", "per-example"),
    ("conv_transpose2d", "gradient", "doubled", "gradient[v]"),
    ("embedding", "moment", "diagonal", "moment"),
    ("layer_norm", "per_example", "turned", "per-example"),
    ("layer_norm", "gradient", "doubled", "gradient[v]"),
]


@pytest.mark.parametrize(("name", "rule", "change", "what"), KIND_MUTANTS)
def test_a_mistake_in_a_kind_is_found(name, rule, change, what):
    right, spoil = getattr(KINDS[name], rule), CHANGES[change]
    mutant = KINDS[name]._replace(**{rule: lambda *args: spoil(right(*args))})
    with pytest.raises(AssertionError, match=r"kind .* is not exact for block") as error:
        assert_exact(mutant, name)
    assert what in str(error.value).splitlines()[1]


def kinds_of(name):
    given = regime(name)
    return {block.layout.kind for block in kf.make_plan(given.fn, given.params, given.batch[0]).blocks}


def test_every_layer_kind_has_a_regime():
    known = {re.sub(r"\dd$", "", getattr(call, "__name__", "")) for call in handlers}  # conv2d is a use of kind conv
    products = {"addmm", "matmul", "mm", "__matmul__", "__rmatmul__"}  # uses of kind einsum
    by_hand = {getattr(call, "__name__", "") for call in broadcast.handlers}  # uses of kinds scale and shift
    rows = {"__getitem__", "index_select"}  # uses of kind embedding
    assert set().union(*(kinds_of(name) for name in LAYERS)) == (known - products - by_hand - rows) | {"scale", "shift"}


def test_the_truth_of_the_regimes():
    """The regimes promise what the dense matrices say: G ⊗ A written out for one of them."""
    given = regime("constant_gradients")
    p, (x, _) = given.params, given.batch
    h = torch.tanh(F.linear(x, p["one"], p["one_bias"]))
    h = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
    truth = kf.testing.dense_ggn(given.fn, given.loss, p, given.batch, blocks=True)["two"]
    assert close(truth, torch.kron(torch.eye(2, dtype=h.dtype), h.T @ h / len(h)))

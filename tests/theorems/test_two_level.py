"""Two-level curvature is its dense definition, and the theorems about it hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._tree import replace_leaves, tree_map
from kfac_func.blocks import input_rows, output_rows, unpack
from kfac_func.linalg.galerkin import Coarse, coarse_matrix
from tests import oracles
from tests.theorems.test_natural_gradient import DAMPING, raveled, solved, state_of, whole
from tests.zoo import CASES, Case, close, measured, randn

C = kf.curvature
INNER = {
    "kronecker": C.kronecker(),
    "eigen": C.eigen(),
    "kpsvd": C.kpsvd(),
    "diagonal": C.diagonal(),
}
SPACES: dict[str, dict[str, Any]] = {
    "nicolaides": {},
    "nicolaides, krylov": {"krylov": True},
    "residual": {"coarse": "residual"},
    "residual, krylov": {"coarse": "residual", "krylov": True},
    "spectral": {"coarse": "spectral"},
}
cases = pytest.mark.parametrize("name", CASES)
some = pytest.mark.parametrize("name", ["mlp", "conv", "grouped", "tokens", "attention"])
spaces = pytest.mark.parametrize("space", SPACES)
forms = pytest.mark.parametrize("form", ["residual", "additive"])


def every_coordinate(ones: dict[str, Tensor]) -> dict[str, Tensor]:
    """R₀ = I."""
    return {name: torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape) for name, x in ones.items()}


def parts(state: Any, tree: Any) -> list[Any]:
    """The tree once per block, zero outside of it; blocks by name."""
    layouts = sorted(state.rules.value.layouts, key=lambda layout: layout.name)
    whole_tree = oracles.flat(tree)
    return [{p: x if p in layout.leaves else 0 * x for p, x in whole_tree.items()} for layout in layouts]


class Dense:
    """A case with the inner curvature as an operator, F_λ dense and R₀ as a matrix, all on the raveled parameters."""

    def __init__(self, name: str, inner: Any = INNER["kronecker"]):
        self.case = CASES[name]
        self.state, self.grads = state_of(self.case, C.blockwise(inner))
        f = whole(name)
        self.f_damped = f + DAMPING * torch.eye(len(f), dtype=f.dtype)
        self.g, self.zeta = self.vector(self.grads), self.vector(self.precondition(self.grads))
        self.rest = self.g - self.f_damped @ self.zeta

    def vector(self, tree: Any) -> Tensor:
        return raveled(tree, self.case)

    def tree(self, vector: Tensor) -> Any:
        leaves = oracles.flat(self.case.params)
        pieces = vector.split([leaf.numel() for leaf in leaves.values()])
        new = {path: piece.reshape(leaves[path].shape) for path, piece in zip(leaves, pieces, strict=True)}
        return replace_leaves(self.case.params, new)

    def precondition(self, tree: Any) -> Any:
        return kf.precondition(self.state, tree)

    def space(self, coarse: str = "nicolaides", krylov: bool = False) -> Tensor:
        if coarse == "nicolaides":
            each = parts(self.state, tree_map(torch.ones_like, self.case.params))
        else:
            each = parts(self.state, self.precondition(self.tree(self.rest)))
        zs = [self.scaled(self.vector(part)) for part in each]
        if krylov:
            more = [self.scaled(self.vector(self.precondition(self.tree(z)))) for z in zs]
            zs = [z for pair in zip(zs, more, strict=True) for z in pair]
        return torch.stack(zs)

    @staticmethod
    def scaled(z: Tensor) -> Tensor:
        return z / z.abs().max()

    def two_level(self, r0: Tensor, form: str) -> Tensor:
        right = r0 @ (self.rest if form == "residual" else self.g)
        return self.zeta + r0.T @ torch.linalg.solve(r0 @ self.f_damped @ r0.T, right)

    def energy(self, v: Tensor) -> Tensor:
        off = v - torch.linalg.solve(self.f_damped, self.g)
        return off @ self.f_damped @ off


def found(name: str, inner: Any = INNER["kronecker"], **options: Any) -> tuple[Any, Any, Tensor]:
    """State, gradient and direction of a two-level curvature."""
    state, grads = state_of(CASES[name], C.two_level(inner, **options))
    return state, grads, raveled(kf.precondition(state, grads), CASES[name])


def matrix_of(state: Any, case: Case) -> Tensor:
    """R₀ of a factorised state."""
    layouts = {layout.name: layout for layout in state.rules.value.layouts}
    zero = {path: 0 * leaf for path, leaf in oracles.flat(case.params).items()}
    shapes = {path: leaf.shape for path, leaf in zero.items()}
    vectors = state.factored.vectors
    rows = [zero | unpack(layouts[name], z, shapes) for name in sorted(vectors) for z in vectors[name]]
    return torch.stack([torch.cat([x.flatten() for x in row.values()]) for row in rows])


# ------------------------------------------------------------------ the definition


@cases
@forms
@pytest.mark.parametrize("space", [s for s in SPACES if s != "spectral"])
def test_it_is_its_dense_definition(name, space, form):
    dense, options = Dense(name), SPACES[space]
    wanted = dense.two_level(dense.space(**options), form)
    assert close(found(name, form=form, **options)[2], wanted, 1e-9)
    assert not close(dense.zeta, wanted, 1e-4)


@cases
@pytest.mark.parametrize("space", ["nicolaides", "nicolaides, krylov", "spectral"])
def test_the_coarse_matrix_is_the_dense_one(name, space):
    """F_c = R₀ (F + λI) R₀ᵀ for the vectors of the state: λ enters as λ⟨z, z'⟩, not as λ, nor as λN."""
    state, _, _ = found(name, **SPACES[space])
    r0, f, factored = matrix_of(state, CASES[name]), whole(name), state.factored
    f_c = r0 @ (f + DAMPING * torch.eye(len(f), dtype=f.dtype)) @ r0.T
    own = Coarse(torch.einsum("kvb,lvb->kl", factored.u, factored.u)) if factored.u != () else state.curvature.coarse
    assert close(coarse_matrix(own, factored.vectors, factored.damping), f_c, 1e-9)
    assert close(state.factored.inverse @ f_c, torch.eye(len(f_c), dtype=f_c.dtype), 1e-8)
    assert close(r0.abs().amax(1), torch.ones(len(r0), dtype=r0.dtype))
    other = r0 @ f @ r0.T + DAMPING * torch.eye(len(r0), dtype=r0.dtype)
    assert not close(state.factored.inverse @ other, torch.eye(len(f_c), dtype=f_c.dtype), 1e-3)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_spectral_vectors_belong_to_the_smallest_eigenvalue(name, inner):
    """Of the inner curvature's own block; a Rayleigh quotient no larger than any other."""
    state, _, _ = found(name, INNER[inner], coarse="spectral")
    for block, matrix in state.rules.value.curvature.dense(state.curvature).items():
        z, values = state.factored.vectors[block].flatten(), torch.linalg.eigvalsh(matrix)
        if inner != "eigen":  # whose eigenvalues are S, not those of G ⊗ A
            assert z @ matrix @ z / (z @ z) <= values[0] + 1e-9 * values[-1]
        kronecker = C.kronecker()
        if inner in ("kronecker", "eigen") and block in CASES[name].blocks:
            a_g = kronecker.dense(kronecker.measure(measured(CASES[name])[block]))
            assert close(a_g @ z, (z @ a_g @ z) / (z @ z) * z, 1e-9)
            assert z @ a_g @ z / (z @ z) <= torch.linalg.eigvalsh(a_g)[0] + 1e-9 * a_g.norm()


# ------------------------------------------------------------------ theorems


@cases
@spaces
def test_the_residual_form_never_raises_the_energy(name, space):
    """‖v − F_λ⁻¹g‖² in the norm of F_λ: less than the inner curvature's, and the larger space is at least as good."""
    dense = Dense(name)
    before, after = dense.energy(dense.zeta), dense.energy(found(name, **SPACES[space])[2])
    assert after <= before * (1 + 1e-9)
    if "krylov" in space:
        assert after <= dense.energy(found(name, **SPACES[space] | {"krylov": False})[2]) * (1 + 1e-9)


@some
@pytest.mark.parametrize("inner", INNER)
def test_galerkin(name, inner):
    """R₀ (g − F_λ v) = 0 on top of every inner curvature; the inner direction does not have it."""
    state, _, v = found(name, INNER[inner])
    dense, r0 = Dense(name, INNER[inner]), matrix_of(state, CASES[name])
    assert (r0 @ (dense.g - dense.f_damped @ v)).norm() <= 1e-9 * (r0 @ dense.g).norm()
    assert (r0 @ dense.rest).norm() > 1e-3 * (r0 @ dense.g).norm()


@cases
def test_with_every_coordinate_it_is_the_natural_gradient(name):
    _, grads, v = found(name, coarse=every_coordinate)
    g = raveled(grads, CASES[name])
    assert close(v, solved(whole(name), DAMPING, g), 1e-9)


@some
def test_fixed_spaces_are_linear_and_the_residual_space_is_homogeneous(name):
    case = CASES[name]
    u, w = (tree_map(lambda x, k=k: randn(*x.shape, seed=k), case.params) for k in (1, 2))
    for options in SPACES.values():
        state, _, _ = found(name, **options)

        def apply(tree: Any, state: Any = state) -> Tensor:
            return raveled(kf.precondition(state, tree), case)

        assert close(apply(tree_map(lambda x: 3 * x, u)), 3 * apply(u), 1e-9)
        assert torch.count_nonzero(apply(tree_map(torch.zeros_like, u))) == 0
        if options.get("coarse") != "residual":
            both = tree_map(lambda x, y: 2 * x - 3 * y, u, w)
            assert close(apply(both), 2 * apply(u) - 3 * apply(w), 1e-9)


# ------------------------------------------------------------------ Kronecker factors between blocks


def spread(x: Tensor, size: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """[n, S] on a larger map, every position the value of the one below it."""
    places = torch.cartesian_prod(*(torch.arange(t) * s // t for s, t in zip(size, target, strict=True)))
    places = places.reshape(-1, len(size))
    strides = torch.tensor([torch.Size(size[k + 1 :]).numel() for k in range(len(size))])
    return x[:, (places * strides).sum(1)]


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_cross_factors_are_sums_over_matched_positions(name):
    """F_c[l, m] = S Σ(mean ā_l ā_mᵀ) Σ(mean g_l g_mᵀ) + λ p δ, the smaller map spread over the larger one."""
    case = CASES[name]
    state, _, v = found(name, coarse="tselepidis", form="additive")
    dense, r0 = Dense(name), matrix_of(state, case)
    names, blocks = sorted(state.factored.vectors), measured(case)
    rows, sizes = {}, {}
    for block in names:
        (use,) = blocks[block].uses
        a, g = input_rows(use, "expand"), output_rows(use, "expand")
        bias = blocks[block].layout.bias is not None
        rows[block] = a.sum(-1) + bias, g.sum(-1)
        grid = use.rule.kind.grid
        sizes[block] = (use.rule.positions,) if grid is None else grid(use.grads)
    f_c = DAMPING * r0 @ r0.T
    for k, one in enumerate(names):
        for m, two in enumerate(names):
            size = (
                [sizes[one], sizes[two]]
                if len(sizes[one]) == len(sizes[two])
                else [(rows[x][0].shape[-1],) for x in (one, two)]
            )
            target = tuple(max(pair) for pair in zip(*size, strict=True))
            (a, g), (a_, g_) = (
                [spread(x.flatten(0, -2), s, target) for x in rows[n]] for n, s in zip((one, two), size, strict=True)
            )
            f_c[k, m] += torch.Size(target).numel() * (a * a_).mean() * (g * g_).sum() / len(a) / g.shape[1]
    assert close(state.factored.inverse, torch.linalg.inv(f_c), 1e-9)
    assert close(v, dense.zeta + r0.T @ torch.linalg.solve(f_c, r0 @ dense.g), 1e-9)


def test_area_averages_the_larger_map():
    found_, other = (
        state_of(CASES["conv"], C.two_level(C.kronecker(), "tselepidis", form="additive", resample=r))[
            0
        ].curvature.coarse
        for r in ("area", "nearest")
    )
    assert close(found_.a.diagonal(), other.a.diagonal())
    assert not close(found_.a, other.a, 1e-3)
    assert close(found_.a, found_.a.T)
    assert close(found_.g, found_.g.T)

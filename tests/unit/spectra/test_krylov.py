"""Lanczos and extreme eigenpairs against dense decompositions and ARPACK."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._tree import ravel
from tests.unit.spectra.operators import LIKE, P, on_tree, rows, seeded, symmetric

GENERAL = torch.linspace(-3, 5, P, dtype=torch.float64)
DECAYING = 2.0 ** -torch.arange(P, dtype=torch.float64)
REPEATED = torch.cat([torch.full((4,), 2.0), torch.linspace(-1, 1, P - 4)]).to(torch.float64)
NEGATIVE = -(torch.linspace(0.5, 9, P, dtype=torch.float64) ** 2)
SPECTRA = {"general": GENERAL, "decaying": DECAYING, "repeated": REPEATED, "negative": NEGATIVE}
WHOLE, RESTARTS, BLOCKS = (None, None), (9, None), (9, 2)  # room and block
TABLE = [
    (spectrum, which, ways)
    for spectrum in SPECTRA
    for which in ("largest", "smallest", "magnitude")
    for ways in (WHOLE, RESTARTS, BLOCKS)
    if ways == WHOLE or (spectrum, which) != ("decaying", "smallest")  # too crowded at 0 for a small space
    if ways != BLOCKS or spectrum != "repeated"  # a block of two sees two of the four copies
]


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_as_many_steps_as_parameters_give_every_eigenpair():
    matrix = symmetric(GENERAL)
    found = kf.spectra.lanczos(on_tree(matrix), LIKE, P, generator=seeded(), vectors=True)
    close(found.values, GENERAL, 1e-10)
    x = rows(found.vectors)
    close(x @ matrix, found.values.unsqueeze(-1) * x, 1e-10)
    close(x @ x.mT, torch.eye(P, dtype=torch.float64), 1e-10)
    assert int(found.steps) == P


@pytest.mark.parametrize("steps", [1, 6])
def test_the_factorisation_and_its_remainder(steps: int):
    matrix = symmetric(GENERAL)
    found = kf.spectra.lanczos(on_tree(matrix), LIKE, steps, generator=seeded(), vectors=True)
    x = rows(found.vectors)
    close(x @ matrix @ x.mT, torch.diag(found.values), 1e-10)
    t = torch.diag(found.diagonal) + torch.diag(found.off_diagonal, 1) + torch.diag(found.off_diagonal, -1)
    close(torch.linalg.eigvalsh(t), found.values, 1e-10)
    remainder = torch.linalg.vector_norm(x @ matrix - found.values.unsqueeze(-1) * x, dim=-1)
    close(found.residuals, remainder, 1e-10)
    assert not bool(found.exhausted)
    assert float(found.residuals.max()) > 1e-3


def test_weights_are_those_of_the_start():
    """The start itself is Σ_j U[0,j] x_j, so the weights are its squared components."""
    found = kf.spectra.lanczos(on_tree(symmetric(GENERAL)), LIKE, 5, generator=seeded(), vectors=True)
    start = torch.randn(P, generator=seeded(), dtype=torch.float64)
    close((rows(found.vectors) @ start / start.norm()).square(), found.weights, 1e-10)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_low_rank_breaks_down_and_says_so(rank: int):
    values = torch.zeros(P, dtype=torch.float64)
    values[:rank] = torch.arange(1.0, rank + 1)
    found = kf.spectra.lanczos(on_tree(symmetric(values)), LIKE, 12, generator=seeded(), vectors=True)
    assert (int(found.steps), len(found.values), bool(found.exhausted)) == (rank + 1, rank + 1, True)
    close(found.values, torch.arange(rank + 1, dtype=torch.float64), 1e-10)
    close(found.residuals, torch.zeros(rank + 1, dtype=torch.float64), 1e-10)


def test_lanczos_under_vmap_pads_what_is_exhausted():
    """Two operators at once, one of rank 2: its row has weight only on eigenvalues, and finite numbers throughout."""
    low = symmetric(torch.cat([torch.zeros(P - 2), torch.tensor([3.0, 7.0])]).to(torch.float64))
    both = torch.stack([symmetric(GENERAL), low])

    def run(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = kf.spectra.lanczos(on_tree(matrix), LIKE, 8, generator=seeded())
        return found.values, found.weights, found.steps

    values, weights, steps = torch.func.vmap(run, randomness="same")(both)
    assert steps.tolist() == [8, 3]
    alone = run(both[0])
    close(values[0], alone[0], 1e-10)
    close(weights[0], alone[1], 1e-8)
    _, mine, _ = run(low)
    for power in range(4):
        close((weights[1] * values[1] ** power).sum(), (mine * run(low)[0] ** power).sum(), 1e-10)


def expected(values: Tensor, which: str, k: int) -> Tensor:
    keys = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    return values[torch.argsort(keys, stable=True)[:k]]


@pytest.mark.parametrize(("spectrum", "which", "ways"), TABLE)
def test_top_eigenpairs_are_those_of_eigh(spectrum: str, which: Any, ways: tuple[int | None, int | None]):
    k, values, (room, block) = 4, SPECTRA[spectrum], ways
    matrix = symmetric(values)
    found = kf.spectra.top_eigenpairs(
        on_tree(matrix), LIKE, k, generator=seeded(), which=which,
        tolerance=1e-10, max_steps=400, room=room, block=block,
    )  # fmt: skip
    assert found.converged.all(), found.residuals
    close(found.values, expected(values, which, k), 1e-8)
    x = rows(found.vectors)
    close(x @ x.mT, torch.eye(k, dtype=torch.float64), 1e-8)
    close(x @ matrix, found.values.unsqueeze(-1) * x, 1e-8)


def test_residuals_are_honest_and_what_has_not_converged_says_so():
    matrix = symmetric(torch.linspace(0, 1, P, dtype=torch.float64))
    found = kf.spectra.top_eigenpairs(on_tree(matrix), LIKE, 3, generator=seeded(), tolerance=1e-9, max_steps=2)
    x = rows(found.vectors)
    wanted = torch.linalg.vector_norm(x @ matrix - found.values.unsqueeze(-1) * x, dim=-1)
    close(found.residuals, wanted, 1e-10)
    assert not found.converged.any()
    nearest = (found.values.unsqueeze(-1) - torch.linspace(0, 1, P, dtype=torch.float64)).abs().amin(-1)
    assert (nearest <= found.residuals).all()


@pytest.mark.parametrize("block", [1, 3, P])
def test_multiples_of_the_identity_and_zero(block: int):
    """Every space is invariant at once; further copies come from made-up directions."""
    for scale in (0.0, 2.0):
        found = kf.spectra.top_eigenpairs(
            lambda v, scale=scale: on_tree(scale * torch.eye(P, dtype=torch.float64))(v),
            LIKE, 3, generator=seeded(), block=block,
        )  # fmt: skip
        assert found.converged.all()
        close(found.values, torch.full((3,), scale, dtype=torch.float64), 1e-10)
        x = rows(found.vectors)
        close(x @ x.mT, torch.eye(3, dtype=torch.float64), 1e-10)


def test_all_pairs():
    matrix = symmetric(GENERAL)
    found = kf.spectra.top_eigenpairs(on_tree(matrix), LIKE, P, generator=seeded(), tolerance=1e-10)
    close(found.values, GENERAL.flip(0), 1e-10)


def test_the_end_comes_with_convergence_and_bars_see_every_step():
    calls: list[int] = []

    def counted(v):
        calls.append(1)
        return on_tree(symmetric(DECAYING))(v)

    seen: list[int] = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    found = kf.spectra.top_eigenpairs(counted, LIKE, 2, generator=seeded(), progress=progress)
    assert found.converged.all()
    assert 2 <= len(seen) < 12
    assert len(calls) == 2 * len(seen)
    seen.clear()
    kf.spectra.lanczos(counted, LIKE, 5, generator=seeded(), progress=progress)
    assert seen == [0, 1, 2, 3, 4]


def test_agrees_with_arpack():
    matrix = symmetric(torch.linspace(-1, 2, 26, dtype=torch.float64) ** 3)
    arpack: Any = scipy.sparse.linalg.eigsh  # its stubs know fewer argument types than it does
    values, vectors = arpack(matrix.numpy(), k=4, which="LM", tol=1e-12)
    order = np.argsort(-np.abs(values))
    found = kf.spectra.top_eigenpairs(
        on_tree(matrix), LIKE, 4, generator=seeded(), which="magnitude", tolerance=1e-11, max_steps=300
    )
    close(found.values, torch.from_numpy(values[order].copy()), 1e-10)
    overlap = (rows(found.vectors) @ torch.from_numpy(vectors[:, order].copy())).abs()
    close(overlap, torch.eye(4, dtype=torch.float64), 1e-8)


def test_chunks_change_nothing():
    matvec = on_tree(symmetric(REPEATED))
    one, some, every = (
        kf.spectra.top_eigenpairs(matvec, LIKE, 5, generator=seeded(), tolerance=1e-10, chunk_size=size)
        for size in (1, 2, None)
    )
    for other in (some, every):
        close(other.values, one.values, 1e-10)


def test_half_precision_and_none_leaves():
    like = {"w": torch.zeros(6, dtype=torch.bfloat16), "frozen": None, "b": torch.zeros(2)}
    scales = torch.tensor([1.0, 2, 3, 4, 5, 16], dtype=torch.bfloat16)
    top = kf.spectra.top_eigenpairs(
        lambda v: {"w": scales * v["w"], "frozen": None, "b": 8 * v["b"]}, like, 2, generator=seeded(), tolerance=0.02
    )
    assert top.values.dtype == torch.float32
    assert top.vectors["w"].dtype == torch.bfloat16
    assert top.vectors["frozen"] is None
    torch.testing.assert_close(top.values, torch.tensor([16.0, 8.0]), rtol=2e-2, atol=0)


def test_the_same_seed_gives_the_same_numbers_and_the_global_generator_rests():
    before, matvec = torch.get_rng_state(), on_tree(symmetric(GENERAL))
    one, two = (kf.spectra.top_eigenpairs(matvec, LIKE, 2, generator=seeded(3)) for _ in range(2))
    assert torch.equal(one.values, two.values)
    assert torch.equal(rows(one.vectors), rows(two.vectors))
    assert torch.equal(before, torch.get_rng_state())


def test_the_curvature_of_a_net():
    """The GGN of a net by jvp and vjp, looped and under vmap, has the eigenvalues of its dense matrix."""
    fn, params = kf.make_functional(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))
    params = {name: p.double() for name, p in params.items()}
    x = torch.randn(9, 3, generator=seeded(), dtype=torch.float64)
    vector, back = ravel(params)
    jacobian = torch.func.jacrev(lambda p: fn(back(p), x).reshape(-1))(vector)
    dense = jacobian.mT @ jacobian / 9

    def matvec(v):
        image = torch.func.jvp(lambda p: fn(p, x), (params,), (v,))[1]
        return torch.func.vjp(lambda p: fn(p, x), params)[1](image / 9)[0]

    values = torch.linalg.eigvalsh(dense).flip(0)
    for size in (1, None):
        top = kf.spectra.top_eigenpairs(matvec, params, 3, generator=seeded(), tolerance=1e-10, chunk_size=size)
        close(top.values, values[:3], 1e-8)


def test_top_eigenpairs_of_an_ensemble():
    """Under vmap no step can be saved, and every member gets its own pairs."""
    both = torch.stack([symmetric(GENERAL), symmetric(REPEATED, seed=2)])

    def run(matrix: Tensor) -> tuple[Tensor, Tensor]:
        found = kf.spectra.top_eigenpairs(
            on_tree(matrix), LIKE, 3, generator=seeded(), tolerance=1e-6, max_steps=60, room=20, chunk_size=None
        )
        return found.values, found.converged

    values, converged = torch.func.vmap(run, randomness="same")(both)
    assert converged.all()
    wanted = torch.stack([GENERAL, REPEATED]).sort(-1, descending=True).values[:, :3]
    close(values, wanted, 1e-8)

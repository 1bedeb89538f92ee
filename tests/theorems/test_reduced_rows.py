"""sharing="reduce" is a statement about A and G: what is exact takes the gradients of examples under either sharing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kfac_func as kf
from kfac_func.blocks import per_example, squares
from tests import oracles
from tests.zoo import CASES, absorbed, close, curvature_of, dense_block, kronecker_block, measured, outer, run

C = kf.curvature
NAMES = ["conv", "tokens", "attention", "tied"]
EXACT = {
    "block_diagonal": C.block_diagonal(),
    "kpsvd": C.kpsvd(iterations=50),
    "kpsvd, radius": C.kpsvd(radius=1),
    "lanczos": C.lanczos(),
}


def blocks_of(name: str) -> list[tuple[str, Any, Any]]:
    """Every matrix block of a case, reduced and expanded."""
    case = CASES[name]
    reduced, expanded = (measured(case, sharing=sharing) for sharing in ("reduce", "expand"))
    return [(path, block, expanded[path]) for path, block in reduced.items() if block.layout.matrix]


@pytest.mark.parametrize("name", NAMES)
def test_the_sharing_is_not_in_the_exact_block(name):
    case, differ = CASES[name], []
    for path, reduced, expanded in blocks_of(name):
        wanted = dense_block(case, path) if path in case.blocks else outer(expanded)
        assert close(outer(reduced), wanted)
        assert close(per_example(reduced), per_example(expanded))
        assert close(C.diagonal().dense(absorbed(C.diagonal(), reduced)).diagonal(), wanted.diagonal())
        assert close(squares(reduced).flatten(), wanted.diagonal())
        differ.append(not close(kronecker_block(reduced), kronecker_block(expanded), 1e-3))
    assert any(differ)


@pytest.mark.parametrize("structure", EXACT)
@pytest.mark.parametrize("name", NAMES)
def test_structures_of_the_exact_block(name, structure):
    own = EXACT[structure]
    for _, reduced, expanded in blocks_of(name):
        assert torch.equal(own.dense(absorbed(own, reduced)), own.dense(absorbed(own, expanded)))


@pytest.mark.parametrize("scalings", ["per_example", "intra_batch"])
@pytest.mark.parametrize("name", NAMES)
def test_scalings_keep_the_trace_and_are_the_best_in_the_reduced_basis(name, scalings):
    own = C.eigen(scalings)
    for _, reduced, _ in blocks_of(name):
        state, wanted = absorbed(own, reduced), outer(reduced)
        assert close(own.dense(state).trace(), wanted.trace())
        off = wanted - own.dense(state)
        kronecker = wanted - kronecker_block(reduced)
        assert off.norm() <= kronecker.norm() * (1 + 1e-9)


@pytest.mark.parametrize("name", ["conv", "attention"])
def test_the_exact_natural_gradient(name):
    case, damping = CASES[name], 0.1
    tx = kf.exact_natural_gradient(damping=damping)
    _, grads, stats = run(case, sharing="reduce")
    direction, _ = tx.update(grads, tx.init(case.params), case.params, stats=stats)
    v, g = (oracles.flat(tree) for tree in (direction, grads))
    f = curvature_of(name).whole(list(v))
    v, g = (torch.cat([leaf.flatten() for leaf in tree.values()]) for tree in (v, g))
    assert close(f @ v + damping * v, g, 1e-8)


def test_cross_factors_stay_reduced():
    """Tselepidis' coarse level is made of Kronecker factors, so that it follows the sharing."""
    curvature = C.two_level(C.kronecker(), "tselepidis", form="additive")
    coarse = [curvature.measure(measured(CASES["conv"], sharing=sharing)).coarse for sharing in ("reduce", "expand")]
    assert not close(coarse[0].a, coarse[1].a, 1e-3)
    assert bool((coarse[0].positions == 1).all())

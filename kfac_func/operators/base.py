r"""The curvature of a state as a linear operator: everything that an eigenbasis gives.

M = F̂ + λ = U diag(S) Uᵀ, block by block        f(M) = U diag(f(S)) Uᵀ
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, StateError, TreeMismatchError, explain
from kfac_func._patterns import first_match
from kfac_func._tracing import known_bad
from kfac_func._tree import Static, storable
from kfac_func._typing import PyTree, Scalar
from kfac_func.blocks import Layout, pack, unpack
from kfac_func.linalg import Spectral, elementwise
from kfac_func.precondition.rules import block_damping, curvature_of
from kfac_func.products import as_scipy
from kfac_func.state import KFacState, observed_one


class LinearOperator(NamedTuple):
    r"""M = F̂ + λ on trees like the parameters: symmetric, block diagonal, pure. Made by `kf.linear_operator`.

    spectra   the eigenvalues S, damping included, and the eigenbases of every block
    like      the parameters: they say what a vector looks like
    layouts   which leaves form which block, and how

    A vector is a tree like the parameters; leaves that are None, and those that a tree lacks, stay away.
    """

    spectra: dict[str, Spectral]
    like: PyTree
    layouts: Static[tuple[Layout, ...]]

    def apply(self, fn: Callable[[Tensor], Tensor], vector: PyTree) -> PyTree:
        """fn(M) v for a function of the eigenvalues, elementwise. Raises TreeMismatchError for another tree."""
        leaves = _checked(self.like, vector)
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        new: dict[str, Tensor] = {}
        for layout in self.layouts.value:
            if any(path in leaves for path in layout.leaves):
                found = self.spectra[layout.name].applied(fn, pack(layout, leaves))
                new |= {path: v.to(leaves[path].dtype) for path, v in unpack(layout, found, shapes).items()}
        return _tree.with_leaves(vector, [new[path] for path in leaves])

    def matvec(self, vector: PyTree) -> PyTree:
        """M v."""
        return self.apply(lambda s: s, vector)

    def solve(self, vector: PyTree) -> PyTree:
        """M⁻¹ v; infinite where an eigenvalue is 0, which a damping λ > 0 excludes."""
        return self.apply(torch.reciprocal, vector)

    def power(self, exponent: Scalar) -> Callable[[PyTree], PyTree]:
        """v ↦ M^p v for any real p: −1 is `solve`, −½ whitens."""
        return lambda vector: self.apply(lambda s: s**exponent, vector)

    def trace(self) -> Tensor:
        """tr M = Σ S, in float64."""
        return self._sum(lambda s: s)

    def logdet(self) -> Tensor:
        """log det M = Σ log S, in float64; −∞ where an eigenvalue is 0."""
        return self._sum(torch.log)

    def eigenvalues(self) -> dict[str, Tensor]:
        """The eigenvalues of every block, [p], ascending."""
        return {name: one.values.flatten().sort().values for name, one in self.spectra.items()}

    def to_dense(self) -> Tensor:
        """M as a matrix [P, P], on the leaves of the parameters one after the other, in tree order."""
        vector, back = _tree.ravel(self.like)
        eye = torch.eye(vector.numel(), dtype=vector.dtype, device=vector.device)
        return torch.func.vmap(lambda e: _tree.ravel(self.matvec(back(e)))[0])(eye)

    def sample(self, generator: torch.Generator | None = None, *, noise: PyTree | None = None) -> PyTree:
        """A draw from N(0, M⁻¹): U diag(S^-½) ε with ε standard normal.

        generator   a torch.Generator; the global one is never touched
        noise       ε itself, a tree like the parameters, in place of a generator (under vmap, where every draw has its
                    own)

        Raises HyperparameterError when there is neither.
        """
        leaves = _checked(self.like, noise) if noise is not None else _normal(self.like, generator)
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        new: dict[str, Tensor] = {}
        for layout in self.layouts.value:
            one, e = self.spectra[layout.name], pack(layout, leaves)
            drawn = one.restored(e.reshape(one.values.shape) * one.values.rsqrt()).reshape(e.shape)
            new |= {path: v.to(leaves[path].dtype) for path, v in unpack(layout, drawn, shapes).items()}
        return _tree.with_leaves(self.like if noise is None else noise, [new[path] for path in leaves])

    def to_scipy(self) -> Any:
        """M as a `scipy.sparse.linalg.LinearOperator`; see `kf.products.as_scipy`."""
        return as_scipy(self.matvec, self.like)

    def _sum(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([fn(one.values.double()).sum() for one in self.spectra.values()]).sum()


storable(LinearOperator)


def linear_operator(state: PyTree, params: PyTree, *, damping: Scalar | None = None) -> LinearOperator:
    r"""The curvature of a K-FAC state as a linear operator on trees like the parameters.

        M = F̂ + λ = U diag(S) Uᵀ        M v,  M⁻¹ v,  M^p v,  tr M,  log det M,  draws from N(0, M⁻¹)

    state     a K-FAC state that has seen statistics, or any state with exactly one inside
    params    the parameters, or a tree like them
    damping   λ ≥ 0 of all blocks, in units of F̂; None: that of the state (by path, with its l2 term). 0 is F̂ itself

    The damping enters as the state's `split` says, so that `solve` is `kf.precondition` right after a refresh. With
    split "exact" M = F̂ + λ I; "pi" and "none" damp the factors. `deflation`, `corrected`, `lanczos` and
    `block_diagonal` have no product basis: M is `dense(state) + λ I` there, one [p, p] matrix per block, with
    negative eigenvalues cut at 0. A parameter that the model never reads has F̂ = 0, so M = λ; one with the policy
    "identity" has M = 1, undamped, as it is not preconditioned either.

    Raises StateError without statistics, for several K-FAC states and for curvature between blocks (`full`,
    `two_level`); HyperparameterError for a negative damping; TreeMismatchError for other parameters.
    Source: George et al. 2018 (1806.03884) for the basis; Ritter et al. 2018 for draws.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.eye(3), torch.zeros(3, 2)
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, [batch], curvature=kf.curvature.kronecker())
        >>> operator = kf.linear_operator(state, params, damping=0.5)
        >>> operator.to_dense().shape, round(operator.trace().item(), 3)
        (torch.Size([8, 8]), 8.0)
        >>> v = operator.solve(operator.matvec(params))
        >>> torch.allclose(v["weight"], params["weight"], atol=1e-5)
        True
        >>> draw = operator.sample(torch.Generator().manual_seed(0))
        >>> draw["weight"].shape
        torch.Size([2, 3])
    """
    one = observed_one(state)
    rules = one.rules.value
    own = curvature_of(one)
    if own.spectra is None:
        raise StateError(
            explain(
                f"{own.name} has no eigenbasis.",
                why="it couples the blocks",
                options="a curvature made by blockwise() or by_path(); or kf.spectra on kf.products.ggn_vp",
            )
        )
    leaves = _same(rules.paths, params)
    lone = _lone(one, leaves)
    known = block_damping(one) | {at.name: _of_path(one, at.name) for at in lone}
    own_damping = known if damping is None else dict.fromkeys(known, _number(damping, one.weight))
    spectra = own.spectra(one.curvature, own_damping, rules.options.split)
    spectra |= {at.name: _flat(at, leaves[at.name], own_damping[at.name]) for at in lone}
    return LinearOperator(spectra, params, Static((*rules.layouts, *lone)))


def _lone(state: KFacState, leaves: dict[str, Tensor]) -> tuple[Layout, ...]:
    """Every leaf without curvature as a block of its own: those with the policy "identity", and those never read."""
    rules = state.rules.value
    covered = {path for layout in rules.layouts for path in layout.leaves}
    policies = dict(rules.unclaimed)
    return tuple(
        Layout(path, policies.get(path, "unused"), path, None, tuple(x.shape), outputs=x.numel(), matrix=False)
        for path, x in leaves.items()
        if path not in covered
    )


def _flat(layout: Layout, leaf: Tensor, damping: Tensor) -> Spectral:
    value = damping.to(leaf) if layout.kind == "unused" else leaf.new_ones(())
    return elementwise(value.expand(leaf.numel()))


def _of_path(state: KFacState, path: str) -> Tensor:
    """λ of a leaf without curvature."""
    if not isinstance(state.damping, dict):
        return state.damping
    return state.damping[first_match(state.damping, path, "damping")]


def _number(damping: Scalar, like: Tensor) -> Tensor:
    if not isinstance(damping, Tensor) and not 0 <= damping < float("inf"):
        raise HyperparameterError(explain("damping must be finite and not negative.", got=damping))
    return torch.as_tensor(damping, dtype=like.dtype, device=like.device)


def _same(paths: tuple[str, ...], params: PyTree) -> dict[str, Tensor]:
    leaves = _tree.unique_paths(params)
    if set(leaves) != set(paths):
        raise TreeMismatchError(
            explain(
                "the parameters are not those that the statistics were taken on.",
                missing=", ".join(repr(path) for path in paths if path not in leaves) or None,
                unexpected=", ".join(repr(path) for path in leaves if path not in paths) or None,
                options="pass the tree that value_grad_and_stats was given",
            )
        )
    return leaves


def _checked(like: PyTree, vector: PyTree) -> dict[str, Tensor]:
    """The leaves of a vector by path."""
    wanted, found = _tree.unique_paths(like), _tree.unique_paths(vector)
    for path, leaf in found.items():
        if path not in wanted or leaf.shape != wanted[path].shape:
            raise TreeMismatchError(
                explain(
                    f"leaf {path!r} of the vector does not fit the parameters.",
                    got=list(leaf.shape),
                    wanted=list(wanted[path].shape) if path in wanted else ", ".join(map(repr, list(wanted)[:20])),
                    options="pass a tree like the parameters; leaves may be None",
                )
            )
    if known_bad(list(found.values())):
        bad = [path for path, leaf in found.items() if known_bad([leaf])]
        raise HyperparameterError(explain("a vector is not finite.", got=", ".join(map(repr, bad[:5]))))
    return found


def _normal(like: PyTree, generator: torch.Generator | None) -> dict[str, Tensor]:
    if generator is None:
        raise HyperparameterError(
            explain(
                "a draw needs random numbers and got no generator.",
                why="the global generator is never touched",
                options="sample(torch.Generator().manual_seed(0)); or noise=, standard normal numbers",
            )
        )
    return {
        path: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
        for path, x in _tree.unique_paths(like).items()
    }

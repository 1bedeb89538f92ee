"""How a coarse level learns and what becomes of its state; dependent vectors; every transformation of torch.func."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._tree import leaves, tree_map
from kfac_func.linalg.galerkin import inverse
from tests.theorems.test_natural_gradient import DAMPING as NATURAL
from tests.theorems.test_two_level import SPACES, Dense
from tests.zoo import CASES, Case, close, measured, randn, run, subset

C = kf.curvature
DAMPING = 0.03
KINDS: dict[str, dict[str, Any]] = SPACES | {
    "additive": {"form": "additive"},
    "tselepidis": {"coarse": "tselepidis", "form": "additive"},
    "function": {"coarse": lambda ones: {name: torch.stack([x, x.cumsum(-1)]) for name, x in ones.items()}},
}
FIXED = ["nicolaides", "additive", "tselepidis", "function"]
kinds = pytest.mark.parametrize("kind", KINDS)


def transform(kind: str, inner: Any = None, **settings: Any) -> kf.GradientTransformation:
    own = C.kronecker() if inner is None else inner
    settings.setdefault("damping", DAMPING)
    return kf.kfac(C.two_level(own, **KINDS[kind]), **settings)


def observed(kind: str, case: Case, times: int = 1, **settings: Any) -> tuple[Any, Any]:
    _, grads, stats = run(case)
    state = transform(kind, **settings).init(case.params)
    for _ in range(times):
        state = kf.observe(state, stats)
    return state, grads


def f_c(state: Any) -> Tensor:
    return torch.linalg.inv(state.factored.inverse)


# ------------------------------------------------------------------ learning


@kinds
def test_the_same_batch_two_hundred_times_changes_nothing(kind):
    """A published code adds the transpose of its statistics at every refresh and grows to 1e31."""
    case = CASES["mlp"]
    (one, grads), (many, _) = observed(kind, case), observed(kind, case, 200)
    if one.factored.inverse != ():
        assert close(f_c(many), f_c(one), 1e-8)
        assert torch.equal(many.factored.inverse, many.factored.inverse.T)
        assert torch.linalg.eigvalsh(many.factored.inverse)[0] > 0
    for x, y in zip(leaves(kf.precondition(many, grads)), leaves(kf.precondition(one, grads)), strict=True):
        assert close(x, y, 1e-8)
    for x, y in zip(leaves(kf.precondition(many, grads)), leaves(kf.precondition(many, grads)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("name", ["mlp", "conv", "tokens"])
def test_moments_are_means_over_examples(kind, name):
    """What crosses micro-batches and ranks."""
    case, curvature = CASES[name], C.two_level(C.kronecker(), **KINDS[kind])
    n = len(case.targets)
    whole = curvature.measure(measured(case))
    parts = [curvature.measure(measured(subset(case, k, k + 1))) for k in range(n)]
    for wanted, *every in zip(leaves(whole.coarse), *(leaves(part.coarse) for part in parts), strict=True):
        assert close(torch.stack(every).mean(0), wanted)
    sums = torch.stack([leaves(part.coarse)[0] for part in parts]).sum(0)
    assert not close(sums, leaves(whole.coarse)[0], 1e-3)


@pytest.mark.parametrize("kind", FIXED)
def test_moments_may_be_reduced_at_once(kind):
    """`measure=` sees one chunk of output vectors at a time."""
    case, curvature = CASES["conv"], C.two_level(C.kronecker(), **KINDS[kind])
    coarse = []
    for estimator in (kf.estimators.exact(), kf.estimators.exact(chunk_size=1)):
        stats = run(case, estimator, measure=curvature.measure)[2]
        coarse.append(kf.observe(kf.kfac(curvature).init(case.params), stats).curvature.coarse)
    assert all(close(x, y) for x, y in zip(*map(leaves, coarse), strict=True))


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_spaces_average_what_f_does_to_them(kind):
    """F̂ = ½ F_1 + ½ F_2, in F_c and, for the residual form, in R₀F as well: Galerkin holds for the average."""
    case = CASES["mlp"]
    other = case._replace(inputs=1.5 * case.inputs + 0.3)
    state = kf.observe(observed(kind, case, average="warmup", decay=0.75)[0], run(other)[2])
    own, two = (observed(kind, c)[0].curvature.coarse for c in (case, other))
    for found, x, y in zip(leaves(state.curvature.coarse), leaves(own), leaves(two), strict=True):
        assert close(found, (x + y) / 2)
    assert not close(leaves(own)[0], leaves(two)[0], 1e-2)


def test_a_batch_that_is_not_finite_is_refused_whole():
    case = CASES["mlp"]
    for kind in KINDS:
        state, _ = observed(kind, case)
        _, _, bad = run(case._replace(inputs=case.inputs * torch.inf))
        after = kf.observe(state, bad)
        assert int(after.rejected) == 1
        assert all(torch.equal(x, y) for x, y in zip(leaves(after.curvature), leaves(state.curvature), strict=True))


# ------------------------------------------------------------------ options


@pytest.mark.parametrize("inner", [C.kronecker(), C.eigen(), C.kpsvd(), C.diagonal()], ids=lambda s: s.name[:5])
def test_without_weight_it_is_the_inner_method_bit_for_bit(inner):
    case = CASES["conv"]
    _, grads, stats = run(case)
    directions = []
    for curvature in (inner, C.two_level(inner, weights=(1.0, 0.0)), C.two_level(inner)):
        tx = kf.kfac(curvature, damping=DAMPING)
        directions.append(leaves(tx.update(grads, tx.init(case.params), stats=stats)[0]))
    plain, without, level = directions
    assert all(torch.equal(x, y) for x, y in zip(plain, without, strict=True))
    assert not all(close(x, y, 1e-4) for x, y in zip(plain, level, strict=True))


def test_weights():
    """ω₁ scales what the residual form corrects, so that Galerkin holds for every ω₁; the additive form is a sum."""
    dense = Dense("mean_square")
    _, grads, stats = run(dense.case)

    def direction(form: Any, *weights: float) -> Tensor:
        one, two = weights
        tx = kf.kfac(C.two_level(C.kronecker(), form=form, weights=(one, two)), damping=NATURAL)
        return dense.vector(tx.update(grads, tx.init(dense.case.params), stats=stats)[0])

    one, two = direction("additive", 1.0, 0.0), direction("additive", 0.0, 1.0)
    assert close(direction("additive", 0.7, 0.4), 0.7 * one + 0.4 * two)
    assert close(direction("residual", 2.0, 0.0), 2 * one)
    r0 = dense.space()
    for weight in (0.0, 0.3, 2.0):
        v = direction("residual", weight, 1.0)
        assert (r0 @ (dense.g - dense.f_damped @ v)).norm() <= 1e-9 * (r0 @ dense.g).norm()
        assert dense.energy(v) <= dense.energy(weight * one)
    half = direction("residual", 0.3, 0.5)
    assert close(half, 0.15 * one + 0.5 * direction("residual", 0.3, 1.0))


def test_a_function_may_span_some_blocks_only():
    case = CASES["mlp"]
    tx = kf.kfac(C.two_level(C.kronecker(), lambda ones: {"first.w": ones["first.w"]}), damping=DAMPING)
    plain = kf.kfac(damping=DAMPING)
    _, grads, stats = run(case)
    found, wanted = (t.update(grads, t.init(case.params), stats=stats)[0] for t in (tx, plain))
    assert torch.equal(found["second"]["w"], wanted["second"]["w"])
    assert not close(found["first"]["w"], wanted["first"]["w"], 1e-4)


@kinds
def test_blocks_without_a_gradient_count_as_zero(kind):
    case = CASES["mlp"]
    state, grads = observed(kind, case)
    zero = {"first": grads["first"], "second": tree_map(torch.zeros_like, grads["second"])}
    part, whole = kf.precondition(state, {"first": grads["first"]}), kf.precondition(state, zero)
    if KINDS[kind].get("coarse") == "residual":  # its vectors live on the blocks that are given
        assert part["first"]["w"].isfinite().all()
        return
    if KINDS[kind].get("form") == "additive" or kind == "tselepidis":
        assert close(part["first"]["w"], whole["first"]["w"])
        assert close(part["first"]["b"], whole["first"]["b"])


# ------------------------------------------------------------------ numbers


def test_dependent_and_zero_vectors_are_as_if_they_were_not_there():
    """The pseudo-inverse: the same correction, however the space is written."""
    case = CASES["mlp"]
    _, grads, stats = run(case)

    def direction(space: Any) -> list[Tensor]:
        tx = kf.kfac(C.two_level(C.kronecker(), space), damping=DAMPING)
        return leaves(tx.update(grads, tx.init(case.params), stats=stats)[0])

    def written(ones: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.stack([x, 3 * x, 0 * x]) for name, x in ones.items()}

    for x, y in zip(direction(written), direction("nicolaides"), strict=True):
        assert close(x, y, 1e-8)


def test_the_inverse_and_its_fallback():
    m = randn(6, 4)
    definite, deficient = m.T @ m, m @ m.T
    assert close(inverse(definite) @ definite, torch.eye(4, dtype=m.dtype))
    found = inverse(deficient)
    assert close(deficient @ found @ deficient, deficient, 1e-9)
    assert torch.linalg.eigvalsh(found)[0] > -1e-9 * found.norm()
    scaled = torch.diag(10.0 ** torch.arange(-8, 8, 4)).double()
    assert close(inverse(scaled @ definite @ scaled), scaled.inverse() @ definite.inverse() @ scaled.inverse(), 1e-8)
    assert torch.count_nonzero(inverse(0 * definite)) == 0
    assert inverse(definite * torch.nan).isnan().all()
    both = torch.func.vmap(inverse)(torch.stack([definite, 0 * definite]))
    assert close(both[0], inverse(definite), 1e-9)
    assert torch.count_nonzero(both[1]) == 0


@kinds
def test_dead_layers_and_single_precision(kind):
    case = CASES["mlp"]
    dead = case._replace(inputs=0 * case.inputs)
    state, grads = observed(kind, dead)
    assert all(x.isfinite().all() for x in leaves(kf.precondition(state, grads)))
    single = case._replace(params=tree_map(torch.Tensor.float, case.params), inputs=case.inputs.float())
    (one, grads), (two, small) = observed(kind, case), observed(kind, single)
    for x, y in zip(leaves(kf.precondition(one, grads)), leaves(kf.precondition(two, small)), strict=True):
        assert y.dtype == torch.float32
        assert close(y.double(), x, 1e-3 if "krylov" in kind else 1e-4)


# ------------------------------------------------------------------ transformations


@kinds
def test_vmap_over_an_ensemble_is_a_loop(kind):
    """Three members, two batches each, the second one of one member rejected."""
    case, tx = CASES["mlp"], transform(kind, refresh_every=1)
    step = kf.value_grad_and_stats(case.fn, case.loss, estimator=kf.estimators.exact())
    plan = kf.make_plan(case.fn, case.params, case.inputs)
    members = [tree_map(lambda p, k=k: p + 0.1 * randn(*p.shape, seed=k), case.params) for k in range(3)]

    def one(params: Any, sick: Tensor) -> Any:
        state = tx.init(params)
        for factor in (1.0, torch.where(sick, torch.nan, 1.3)):
            moved = tree_map(lambda p, factor=factor: p * factor, params)
            _, grads, stats = step(moved, case.batch, plan=plan)
            grads = tree_map(lambda g: torch.nan_to_num(g, nan=0.5), grads)
            updates, state = tx.update(grads, state, params, stats=stats)
        return updates, state.rejected

    sick = torch.tensor([False, True, False])
    together = torch.func.vmap(one)(tree_map(lambda *x: torch.stack(x), *members), sick)
    for k, member in enumerate(members):
        for got, wanted in zip(leaves(together), leaves(one(member, sick[k])), strict=True):
            torch.testing.assert_close(got[k], wanted, rtol=1e-7, atol=1e-9)
    assert together[1].tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", ["nicolaides", "nicolaides, krylov", "residual", "tselepidis"])
def test_gradients_flow_through_the_damping(kind):
    case = CASES["mean_square"]
    _, grads, stats = run(case)

    def length(damping: Tensor) -> Tensor:
        tx = transform(kind, damping=damping)
        return torch.stack(
            [x.square().sum() for x in leaves(tx.update(grads, tx.init(case.params), stats=stats)[0])]
        ).sum()

    at, step = torch.tensor(0.05).double(), 1e-6
    slope = (length(at + step) - length(at - step)) / (2 * step)
    torch.testing.assert_close(torch.func.grad(length)(at), slope, rtol=1e-5, atol=0)


@kinds
def test_a_state_survives_a_file(kind):
    if kind == "function":
        kind = "nicolaides"
    case = CASES["conv"]
    state, grads = observed(kind, case)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    tx = transform(kind)
    one, two = (tx.update(grads, s, stats=run(case)[2])[0] for s in (state, loaded))
    assert all(torch.equal(x, y) for x, y in zip(leaves(one), leaves(two), strict=True))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when it imports the compiler
@pytest.mark.parametrize("kind", ["nicolaides", "nicolaides, krylov", "residual", "tselepidis"])
def test_an_update_is_one_graph(kind):
    case, tx, backend = CASES["mlp"], transform(kind), "aot_eager" if kind == "residual" else "eager"
    _, grads, stats = run(case)
    state = tx.update(grads, tx.init(case.params), stats=stats)[1]

    def update(state: Any) -> Any:
        return tx.update(grads, state, stats=stats, refresh=True, scale=True)[0]

    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True, backend=backend)
    for x, y in zip(leaves(compiled(state)), leaves(update(state)), strict=True):
        assert close(x, y, 1e-9)

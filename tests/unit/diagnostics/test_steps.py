"""The numbers of a step: each is what its own function says, for every curvature, and over stacked states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import kfac_func as kf
from kfac_func import _tree
from kfac_func._errors import StateError, TreeMismatchError
from tests.zoo import CASES, run
from tests.zoo.run import close

C, D = kf.curvature, kf.diagnostics
CURVATURES: dict[str, Any] = {
    "kronecker": C.kronecker(),
    "eigen": C.eigen(),
    "kpsvd": C.kpsvd(),
    "deflation": C.deflation(),
    "diagonal": C.diagonal(),
    "identity": C.blockwise(C.identity(), C.identity()),
}
COUPLED: dict[str, Any] = {"full": C.full(), "two_level": C.two_level(C.kronecker())}


def stepped(curvature: Any, net: str = "conv") -> tuple[Any, Any, Any, Any]:
    """The state of a chain after an update, the parameters before it, the gradient and the updates."""
    case = CASES[net]
    _, grads, stats = run(case)
    tx = kf.chain(kf.kfac(curvature, damping=0.3), kf.sgd(0.1))
    updates, state = tx.update(grads, tx.init(case.params), case.params, stats=stats)
    return state, case.params, grads, updates


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_summary_says_what_its_parts_say(curvature: str):
    state, params, grads, updates = stepped(CURVATURES[curvature])
    found = D.summary(state, params, grads, updates)
    one = _tree.nodes(state, kf.KFacState)[0]
    assert (int(found.step), int(found.observed), int(found.rejected), int(found.failed)) == (1, 1, 0, 0)
    wanted = D.Summary(
        *(one.step, one.observed, one.rejected, one.failed),
        damping=D.damping(state),
        pi=D.pi(state),
        condition={name: value.damped for name, value in D.condition_numbers(state).items()},
        trace=D.traces(state),
        params=D.norms(params, state),
        grads=D.norms(grads, state),
        updates=D.norms(updates, state),
        ratio=D.norm_ratio(updates, params, state),
        cosine=D.cosine(updates, grads, state),
        fisher=D.fisher_norms(state, params, updates),
    )
    mine, theirs = D.flat(found), D.flat(wanted)
    assert list(mine) == list(theirs)
    assert all(close(mine[name].double(), value.double(), 1e-12) for name, value in theirs.items())
    assert all(value.ndim == 0 for value in mine.values())
    assert -1 <= float(found.cosine.total) < 0 < float(found.fisher.total)


@pytest.mark.parametrize("curvature", COUPLED)
def test_curvature_between_blocks_leaves_out_what_it_has_not(curvature: str):
    found = D.summary(*stepped(COUPLED[curvature], "mlp"))
    assert (found.pi, found.condition, found.trace, found.fisher) == ({}, {}, {}, ())
    assert set(found.damping) == set(found.cosine.parts) == {"first.w", "second.w"}
    assert D.table(found).splitlines()[1].split() == [
        *("block", "damping", "params", "grads", "updates", "ratio", "cosine")
    ]


def test_what_was_not_asked_for_is_not_there():
    state, params, grads, updates = stepped(C.eigen())
    assert D.summary(state, params)[9:] == ((),) * 5
    only = D.summary(state, params, grads)
    assert (only.updates, only.ratio, only.cosine, only.fisher) == ((),) * 4
    only = D.summary(state, params, updates=updates)
    assert (only.grads, only.cosine) == ((), ())
    assert close(only.fisher.total, D.fisher_norms(state, params, updates).total)


def test_pi_of_a_grouped_layer_is_the_mean_over_its_groups():
    state, params, *_ = stepped(C.kronecker(), "grouped")
    assert D.pi(state)["conv.weight"].shape == (2,)
    assert torch.equal(D.summary(state, params).pi["conv.weight"], D.pi(state)["conv.weight"].mean())


def test_the_table_has_a_row_per_block_and_one_of_all():
    state, params, grads, updates = stepped(C.eigen(), "tokens")
    found = D.summary(state, params, grads, updates)
    head, titles, *rows = D.table(found).splitlines()
    assert head == "step 1, 1 batches observed, 0 rejected, 0 factorisations failed"
    assert titles.split()[:5] == ["block", "damping", "pi", "condition", "trace"]
    assert [row.split()[0] for row in rows] == [*found.params.parts, "all"]
    norm = next(row.split() for row in rows if row.startswith("norm.weight"))
    assert norm[2] == "-"
    assert norm[5] == f"{float(found.params.parts['norm.weight']):.3g}"
    assert rows[-1].split()[4] == f"{sum(map(float, found.trace.values())):.3g}"
    assert rows[-1].split()[-2] == f"{float(found.cosine.total):.3g}"


@pytest.mark.parametrize("curvature", ["kronecker", "eigen"])
def test_summaries_map_over_an_ensemble(curvature: str):
    members, tx = [], kf.kfac(CURVATURES[curvature], damping=0.3)
    for scale in (1.0, 1.5):
        case = CASES["mlp"]
        case = case._replace(params=_tree.tree_map(lambda x, scale=scale: scale * x, case.params))
        _, grads, stats = run(case)
        updates, state = tx.update(grads, tx.init(case.params), stats=stats)
        members.append((state, case.params, grads, updates))
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *members)
    together = D.flat(torch.vmap(D.summary)(*stacked))
    for k, member in enumerate(members):
        for name, value in D.flat(D.summary(*member)).items():
            assert close(together[name][k].double(), value.double(), 1e-9), name


def test_a_summary_leaves_everything_as_it_was_and_can_be_saved(tmp_path: Any):
    given = stepped(C.eigen())
    before = [x.clone() for x in _tree.leaves(given)]
    found = D.summary(*given)
    assert all(map(torch.equal, before, _tree.leaves(given)))
    torch.save(found, tmp_path / "summary.pt")
    back = D.flat(torch.load(tmp_path / "summary.pt", weights_only=True))
    assert all(torch.equal(back[name], value) for name, value in D.flat(found).items())


def test_summaries_refuse_states_without_statistics_and_other_trees():
    state, params, _, updates = stepped(C.eigen())
    with pytest.raises(StateError, match=r"no statistics(.|\n)*kf\.observe"):
        D.summary(kf.kfac().init(params), params)
    with pytest.raises(TreeMismatchError, match=r"leaf 'head\.bias'"):
        D.summary(state, params, {name: x for name, x in updates.items() if name != "head.bias"}, updates)

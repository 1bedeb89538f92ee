"""Models that the tape or a vmap cannot take: every per-example function against backward passes, one after the
other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import errors
from tests.zoo import close

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
P = kf.products
LOSS = kf.losses.cross_entropy()
SEED = 7


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        seen = (~padded).unsqueeze(-1)
        return self.head((self.body(x, src_key_padding_mask=padded) * seen).sum(1) / seen.sum(1))


class Gpt(nn.Module):
    """Positions of arange(T), and a mask that is asked whether it is full."""

    def __init__(self):
        super().__init__()
        self.token, self.place, self.q, self.head = (
            nn.Embedding(11, 4), nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 3),
        )  # fmt: skip

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        e = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        scores = self.q(e) @ e.mT
        if not mask.all():
            scores = scores.masked_fill(~mask[:, None, :], -1e9)
        return self.head((scores.softmax(-1) @ e)[:, 0])


class Dropped(nn.Module):
    """Dropout, and a gain that the tape cannot see when asked for."""

    def __init__(self, gain: bool):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.tensor(1.3)) if gain else torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gain.exp() * F.dropout(torch.tanh(self.body(x)), 0.5, self.training))


class Pooled(nn.Module):
    """squeeze(): another model for a single example."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gain.exp() * torch.tanh(self.conv(x)).mean((2, 3), keepdim=True).squeeze())


class Old(torch.autograd.Function):
    """Written before torch.func: it cannot follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * ctx.saved_tensors[0].cos()


class Before(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Old.apply(self.body(x)))


class Model(NamedTuple):
    fn: Any
    params: dict[str, Tensor]
    inputs: Any
    taken: Any  # the route that can
    targets: Tensor = torch.tensor([0, 2, 1, 1, 0, 2])

    @property
    def batch(self) -> tuple[Any, Tensor]:
        return self.inputs, self.targets


def model(made: Callable[[], nn.Module], inputs: Any, taken: str, train: bool = False) -> Callable[[], Model]:
    def built() -> Model:
        torch.manual_seed(3)
        return Model(*kf.make_functional(made().double().train(train)), inputs, taken)

    return built


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LENGTHS = torch.tensor([5, 2, 3, 1, 4, 5])
MASK = torch.arange(5) < LENGTHS[:, None]
IDS = torch.arange(30).mul(7).remainder(11).reshape(6, 5)
MODELS = {
    "lstm": model(Recurrent, numbers(6, 7, 4), "loop"),
    "encoder": model(Encoder, (numbers(6, 5, 4), ~MASK), "tape"),
    "gpt": model(Gpt, (IDS, MASK), "loop"),
    "dropout": model(lambda: Dropped(False), numbers(6, 4), "tape", train=True),
    "dropout and a gain": model(lambda: Dropped(True), numbers(6, 4), "loop", train=True),
    "squeezed": model(Pooled, numbers(6, 1, 5, 5), "loop"),
    "before torch.func": model(Before, numbers(6, 4), "loop"),
}
REFUSED = {
    "tape": set(MODELS) - {"encoder", "dropout"},
    "vmap": set(MODELS),
}
each = pytest.mark.parametrize("name", MODELS)


def jacobians(m: Model) -> dict[str, Tensor]:
    """∂z_n/∂w [N, D, *shape] on the whole batch, with the random numbers of SEED."""
    torch.manual_seed(SEED)
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in m.params.items()}
    z = m.fn(leaves, m.inputs)
    rows = [
        [
            torch.autograd.grad(
                one, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for one in own
        ]
        for own in z
    ]
    return {path: torch.stack([torch.stack([r[k] for r in own]) for own in rows]) for k, path in enumerate(leaves)}


def outputs(m: Model) -> Tensor:
    torch.manual_seed(SEED)
    return m.fn(m.params, m.inputs)


def flat(tree: dict[str, Tensor], dims: int) -> Tensor:
    return torch.cat([tree[path].reshape(*tree[path].shape[:dims], -1) for path in sorted(tree)], dim=-1)


def asked(call: Callable[[], Any]) -> Any:
    torch.manual_seed(SEED)
    return call()


@each
def test_every_function_takes_every_model(name):
    m = MODELS[name]()
    j, z = flat(jacobians(m), 2), outputs(m)
    score = z.softmax(1) - F.one_hot(m.targets, 3)
    grads = torch.einsum("nd,ndp->np", score, j)
    curved = torch.diag_embed(z.softmax(1)) - z.softmax(1).unsqueeze(2) * z.softmax(1).unsqueeze(1)
    ggn = torch.einsum("ndp,nde,neq->npq", j, curved, j)
    options: Any = {"route": m.taken}
    assert close(flat(asked(lambda: P.per_example_grads(m.fn, LOSS, **options)(m.params, m.batch)), 1), grads)
    assert close(asked(lambda: P.per_example_norms(m.fn, LOSS, **options)(m.params, m.batch)), grads.norm(dim=1))
    assert close(asked(lambda: P.per_example_gram(m.fn, LOSS, **options)(m.params, m.batch)), grads @ grads.mT)
    assert close(flat(asked(lambda: P.jacobian(m.fn, **options)(m.params, m.inputs)), 2), j)
    ntk = asked(lambda: P.empirical_ntk(m.fn, **options)(m.params, m.inputs))
    assert close(ntk, torch.einsum("ndp,mep->nmde", j, j))
    diagonal = asked(lambda: P.fisher_diagonal(m.fn, LOSS, **options)(m.params, m.batch))
    assert close(flat(diagonal, 0), ggn.diagonal(dim1=1, dim2=2).mean(0))
    traces = asked(lambda: P.per_example_traces(m.fn, LOSS, **options)(m.params, m.batch))
    assert close(traces, ggn.diagonal(dim1=1, dim2=2).sum(1))


@each
def test_auto_takes_the_first_route_that_can_and_says_so_once(name):
    m = MODELS[name]()
    made, wanted = P.per_example_grads(m.fn, LOSS), P.per_example_grads(m.fn, LOSS, route=m.taken)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [asked(lambda: made(m.params, m.batch)) for _ in range(2)]
    told = [str(one.message) for one in said if issubclass(one.category, errors.KFacWarning)]
    assert len(told) == (m.taken != "tape")
    assert all(f"route='{m.taken}'" in one for one in told)
    for one in found:
        assert close(flat(one, 1), flat(asked(lambda: wanted(m.params, m.batch)), 1))


@each
@pytest.mark.parametrize("route", ["tape", "vmap"])
def test_an_explicit_route_is_right_or_refuses(name, route):
    m = MODELS[name]()
    made, wanted = (P.per_example_grads(m.fn, LOSS, route=one) for one in (route, "loop"))
    if name in REFUSED[route]:
        with pytest.raises((errors.CaptureError, RuntimeError), match=r"'loop'|setup_context"):
            asked(lambda: made(m.params, m.batch))
    else:
        found, loop = (asked(lambda one=one: one(m.params, m.batch)) for one in (made, wanted))
        assert close(flat(found, 1), flat(loop, 1))


@each
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_chunks_draw_what_their_outputs_were_drawn_with(name, chunk_size):
    """The gradients of a chunk are those at its own outputs: its masks are drawn once."""
    m = MODELS[name]()
    if name == "squeezed" and chunk_size == 1:  # loud: outputs [3] for one example
        chunk_size = 2
    seen: list[Tensor] = []

    def watched(p: Any, x: Any) -> Tensor:
        seen.append(m.fn(p, x))
        return seen[-1]

    made = P.per_example_norms(watched, LOSS, route=m.taken, chunk_size=chunk_size)
    asked(lambda: made(m.params, m.batch))
    seen.clear()
    found = asked(lambda: made(m.params, m.batch))
    count = -(-6 // chunk_size)
    others = 0 if "dropout" in name else -(-6 // max(chunk_size, 2))  # the same examples in other chunks
    assert len(seen) == 2 * count + others
    assert all(close(one.detach(), two.detach()) for one, two in zip(seen[:count], seen[-count:], strict=True))
    if "dropout" not in name:
        assert close(found, P.per_example_norms(m.fn, LOSS, route="loop")(m.params, m.batch))


@each
def test_draws_move_on_as_those_of_the_model(name):
    """Two calls have other masks, as two calls of the model."""
    m = MODELS[name]()
    made = P.per_example_norms(m.fn, LOSS, route=m.taken)
    one, two = asked(lambda: (made(m.params, m.batch), made(m.params, m.batch)))
    assert close(one, two) != ("dropout" in name)


@each
@pytest.mark.filterwarnings("ignore::kfac_func._errors.KFacWarning")
def test_only_is_the_model_as_a_function_of_some_leaves(name):
    m, wanted = MODELS[name](), jacobians(MODELS[name]())
    for route in ("auto", "loop"):
        found = asked(lambda route=route: P.jacobian(m.fn, route=route, only=["head.weight"])(m.params, m.inputs))
        assert close(found["head.weight"], wanted["head.weight"])
        assert all(leaf is None for path, leaf in found.items() if path != "head.weight")


def test_only_leaves_out_what_the_tape_cannot_see():
    """No warning: the rest of the model is seen."""
    m = MODELS["lstm"]()
    grads = P.per_example_grads(m.fn, LOSS, only=["head.*"])(m.params, m.batch)
    every = P.per_example_grads(m.fn, LOSS, route="loop")(m.params, m.batch)
    assert all(close(grads[path], every[path]) for path in ("head.weight", "head.bias"))
    rows = flat({path: every[path] for path in ("head.weight", "head.bias")}, 1)
    assert close(P.per_example_norms(m.fn, LOSS, only=["head.*"])(m.params, m.batch), rows.norm(dim=1))
    assert close(P.per_example_gram(m.fn, LOSS, only=["head.*"])(m.params, m.batch), rows @ rows.mT)
    diagonal = P.fisher_diagonal(m.fn, LOSS, kf.estimators.empirical(), only=["head.*"])(m.params, m.batch)
    assert close(diagonal["head.weight"], every["head.weight"].square().mean(0))
    assert diagonal["cells.weight_hh_l0"] is None
    traces = P.per_example_traces(m.fn, LOSS, kf.estimators.empirical(), only=["head.*"])(m.params, m.batch)
    assert close(traces, rows.square().sum(1))

"""Modules that write: batch norm and spectral norm in training are told, and right in eval mode; renormed embeddings;
compiled modules.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import kfac_func as kf
from kfac_func._errors import CaptureError
from tests.kinds import truth
from tests.zoo import close, randn

N = 6
X, Y, IMAGES = randn(N, 4, seed=1), torch.tensor([0, 2, 1, 1, 0, 2]), randn(N, 2, 3, 3, seed=2)
IDS = torch.arange(24).mul(5).remainder(7).reshape(N, 4)
LOSS = kf.losses.cross_entropy()


def of(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """torch's own gradients."""
    params = {path: leaf for path, leaf in module.named_parameters() if leaf.requires_grad}
    found = torch.autograd.grad(F.cross_entropy(module(inputs), Y), list(params.values()))
    return dict(zip(params, found, strict=True))


def stepped(fn: Any, params: Any, inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    return kf.value_grad_and_stats(fn, LOSS, **options)(params, (inputs, Y), generator=truth.seeded())[1]


def normed(**options: Any) -> nn.Module:
    head = nn.Sequential(nn.Flatten(), nn.Linear(27, 3))
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, **options), nn.ReLU(), head).double()


@pytest.mark.parametrize(
    "options", [{}, {"strict": False}, {"unclaimed": "diagonal"}, {"unclaimed": {"1.*": "identity"}}]
)
def test_batch_norm_in_training_is_told_whatever_the_policy(options):
    module = normed(track_running_stats=False)
    with pytest.raises(CaptureError, match=r"(?s)'1\.weight' is used by batch_norm.*mix the examples"):
        stepped(*kf.make_functional(module), IMAGES, **options)
    tracked = normed()
    with pytest.raises(CaptureError, match=r"(?s)'1' is in training mode.*\.eval\(\)"):
        stepped(*kf.make_functional(tracked), IMAGES, **options)
    assert int(tracked.get_buffer("1.num_batches_tracked")) == 0


def test_batch_norm_in_eval_mode_is_torchs():
    module = normed()
    module(3 * IMAGES + 1)
    module.get_submodule("1").eval()
    fn, params = kf.make_functional(module)
    for _ in range(2):
        truth.same(stepped(fn, params, IMAGES), of(module, IMAGES))


class Quantised(nn.Module):
    """A codebook that follows what it sees while it trains."""

    book: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.head, self.how = nn.Linear(4, 2), nn.Linear(2, 3), how
        self.register_buffer("book", randn(5, 2, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        nearest = torch.cdist(h.detach(), self.book).argmin(1)
        if self.training:
            new = 0.9 * self.book[nearest] + 0.1 * h.detach()
            if self.how == "in place":
                self.book.index_copy_(0, nearest, new)
            else:
                self.book = self.book.index_copy(0, nearest, new)
        return self.head(h + (self.book[nearest] - h).detach())


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_codebook_that_moves_is_told_and_right_when_it_stands(how):
    module = Quantised(how).double()
    fn, params = kf.make_functional(module)
    kept = module.book.clone()
    for call in (lambda: fn(params, X), lambda: stepped(fn, params, X)):
        with pytest.raises(CaptureError, match=r"(?s)'book'.*\.eval\(\)"):
            call()
    assert torch.equal(module.book, kept)
    module.eval()
    truth.same(stepped(fn, params, X), of(module, X))
    assert torch.equal(fn(params, X), fn(params, X))


def test_spectral_norm_in_eval_mode_is_torchs():
    module = nn.Sequential(spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
    fn, params = kf.make_functional(module)
    with pytest.raises(CaptureError, match="spectral norm"):
        fn(params, X)
    module.eval()
    assert torch.equal(fn(params, X), fn(params, X))
    truth.same(stepped(fn, params, X, unclaimed="diagonal"), of(module, X))


class Renormed(nn.Module):
    """Rows of the embedding are shortened where they are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4, max_norm=1.0), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).flatten(1).tanh())


def test_an_embedding_that_shortens_its_rows_leaves_parameters_as_they_are():
    fn, params = kf.make_functional(Renormed().double())
    long = params | {"table.weight": 3 * randn(7, 4, seed=5)}
    kept = {path: leaf.clone() for path, leaf in long.items()}
    norms = long["table.weight"].norm(dim=1, keepdim=True)
    short = long | {"table.weight": torch.where(norms > 1, long["table.weight"] / (norms + 1e-7), long["table.weight"])}

    def plain(p: dict, ids: Tensor) -> Tensor:
        return F.linear(p["table.weight"][ids].flatten(1).tanh(), p["head.weight"], p["head.bias"])

    assert close(fn(long, IDS), plain(short, IDS))
    v = {path: torch.ones_like(leaf) for path, leaf in long.items()}
    for made in ("hvp", "ggn_vp"):
        found, wanted = (getattr(kf.products, made)(f, LOSS)(p, (IDS, Y))(v) for f, p in ((fn, long), (plain, short)))
        truth.same(found, wanted)
    with pytest.raises(CaptureError, match=r"'table\.weight'"):
        stepped(fn, long, IDS)
    truth.same(long, kept, 0)


@pytest.mark.parametrize("wrapped", ["whole", "method"])
def test_a_compiled_module_runs_as_it_was_written(wrapped):
    module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    wanted = of(module, X)
    if wrapped == "whole":
        given: Any = torch.compile(module, backend="eager")
    else:
        given = module
        given.compile(backend="eager")
    fn, params = kf.make_functional(given)
    assert set(params) == set(wanted)
    for estimator in (kf.estimators.exact(), kf.estimators.monte_carlo()):
        truth.same(stepped(fn, params, X, estimator=estimator), wanted)

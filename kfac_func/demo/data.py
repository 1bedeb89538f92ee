"""The two data sets of the demo: generated curve images and scikit-learn's handwritten digits.

    curves  [N, 784]    a smooth curve through three random points: six degrees of freedom in 784 pixels
    digits  [1797, 64]  handwritten digits, 8 x 8 pixels

Both are intensities in [0, 1], so sigmoid cross entropy cannot reach zero: its floor is the binary entropy of the
intensities (`entropy_floor`), and a network that has only learnt the mean image sits on a plateau (`mean_image_loss`).
The curves follow the data set of Hinton & Salakhutdinov 2006 in spirit; the drawing is our own, so losses are not
comparable with published ones.
"""

from __future__ import annotations

import torch

from kfac_func.demo.packages import require

SIDE = 28
_SAMPLES = 160
_CHUNK = 100


def curves(
    count: int, generator: torch.Generator, *, side: int = SIDE, sigma: float = 0.49, ink: float = 1.8
) -> torch.Tensor:
    """Draw `count` grey images [count, side²] in [0, 1], each of one curve p through three random points P.

        p(t) = P₀ (2t - 1)(t - 1) + P₁ 4t(1 - t) + P₂ t(2t - 1),    0 ≤ t ≤ 1,    P uniform in [1/7, 6/7]² of the side
        image(x) = min(1, ink · exp(-min_t |x - p(t)|² / 2σ²))

    `sigma` is the half width σ of the stroke in pixels, `ink` its height before clipping. The generator must be on the
    CPU; equal seeds give equal images. With the defaults the entropy floor of 2000 images is 19.5 nats, their plateau
    123.3.

    >>> images = curves(3, torch.Generator().manual_seed(0))
    >>> images.shape, bool(images.min() >= 0), bool(images.max() <= 1)
    (torch.Size([3, 784]), True, True)
    """
    points = (4 + 20 * torch.rand(count, 3, 2, generator=generator)) * (side / SIDE)
    t = torch.linspace(0, 1, _SAMPLES)
    lagrange = torch.stack([(2 * t - 1) * (t - 1), 4 * t * (1 - t), t * (2 * t - 1)], dim=1)
    paths = lagrange @ points
    pixels = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    distances = torch.cat([torch.cdist(pixels, chunk).amin(dim=-1) for chunk in paths.split(_CHUNK)])
    return (ink * torch.exp(-0.5 * (distances / sigma) ** 2)).clamp(max=1)


def digits() -> torch.Tensor:
    """Load scikit-learn's handwritten digits as intensities [1797, 64] in [0, 1].

    Raises ImportError when scikit-learn is not installed (the message names the extra to install).

    >>> digits().shape
    torch.Size([1797, 64])
    """
    require("sklearn")
    from sklearn.datasets import load_digits

    images, _ = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 16


def entropy_floor(images: torch.Tensor) -> float:
    """Mean over images [N, D] of Σ_d H(x_d) in nats, the least sigmoid cross entropy that any model can reach.

    >>> round(entropy_floor(torch.full((4, 2), 0.5)), 4)
    1.3863
    """
    return _cross_entropy(images, images)


def mean_image_loss(images: torch.Tensor) -> float:
    """Loss in nats per image [N, D] of a model that answers with the mean image whatever its input: the plateau.

    >>> round(mean_image_loss(torch.tensor([[0.0], [1.0]])), 4)
    0.6931
    """
    return _cross_entropy(images.mean(dim=0).expand_as(images), images)


def _cross_entropy(probabilities: torch.Tensor, images: torch.Tensor) -> float:
    terms = torch.nn.functional.binary_cross_entropy(probabilities.double(), images.double(), reduction="none")
    return float(terms.sum(dim=1).mean())

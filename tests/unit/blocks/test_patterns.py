"""Second moments of rows: by halves, image by image, and in one product they are the same."""

from __future__ import annotations

import pytest
import torch

from kfac_func.blocks import patterns
from kfac_func.blocks.patterns import map_moment, second_moment

G = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


@pytest.mark.parametrize("columns", [8, 9, 17, 40])
def test_halves_make_the_whole(columns: int, monkeypatch: pytest.MonkeyPatch):
    rows = random(40, columns)
    monkeypatch.setattr(patterns, "HALVED", 8)
    torch.testing.assert_close(second_moment(rows), rows.mT @ rows, rtol=1e-12, atol=1e-12)


def test_halves_are_taken_where_there_are_columns_and_rows_enough(monkeypatch: pytest.MonkeyPatch):
    taken: list[int] = []
    halves = patterns._by_halves
    monkeypatch.setattr(patterns, "_by_halves", lambda rows: taken.append(rows.shape[1]) or halves(rows))
    wide = patterns.HALVED
    for shape in ((wide, wide), (wide - 1, wide), (wide, wide - 1), (2 * wide, 2 * wide)):
        second_moment(random(*shape))
    assert taken == [wide, 2 * wide, wide, wide]


@pytest.mark.parametrize(("positions", "channels"), [(9, 4), (4, 9), (70, 65), (70, 64)])
def test_images_one_by_one_or_all_at_once(positions: int, channels: int):
    maps = random(2, 3, channels, positions)
    rows = maps.mT
    want = rows.flatten(0, 2).mT @ rows.flatten(0, 2)
    torch.testing.assert_close(map_moment(rows), want, rtol=1e-12, atol=1e-12)

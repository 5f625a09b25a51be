"""The notebook's pictures: a colour a number, curves where their values are."""

import numpy as np
import pytest
import torch

from utils.plotting import EMPTY, PALETTE, cells, curves


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def test_cells_give_each_number_its_colour():
    picture = cells("t", torch.tensor([[0, 1, -1], [1, 1, len(PALETTE)]]), width=20, height=10)
    body = np.asarray(picture)[-20:]  # under the title
    seen = [[tuple(body[10 * r + 5, 20 * c + 10].tolist()) for c in range(3)] for r in range(2)]
    assert seen == [
        [rgb(PALETTE[0]), rgb(PALETTE[1]), rgb(EMPTY)],
        [rgb(PALETTE[1]), rgb(PALETTE[1]), rgb(PALETTE[0])],
    ]
    assert (
        picture.size[0] >= 60
        and cells("a title much longer than the picture", torch.zeros(1, 1, dtype=torch.int64)).size[0] > 100
    )


def test_curves_stand_where_their_values_are():
    picture = np.asarray(curves("t", {"falls": ([0, 10], [2.0, 0.0]), "flat": ([0, 10], [1.0, 1.0])}))
    falls, flat = (
        (picture == rgb(PALETTE[i])).all(-1)[:, :500] for i in (0, 1)
    )  # without the names on the right
    heights = [np.nonzero(falls[:, x])[0].mean() for x in (100, 300, 490)]
    assert heights[0] < heights[1] < heights[2]
    level = [np.nonzero(flat[:, x])[0].mean() for x in (100, 300, 490)]
    assert np.ptp(level) < 1 and heights[0] < level[0] < heights[2]


@pytest.mark.parametrize("values", [[], [-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_curves_refuse_what_cannot_be_drawn(values):
    with pytest.raises(ValueError, match="a loss: curves need values"):
        curves("a loss", {"it": (range(len(values)), values)})

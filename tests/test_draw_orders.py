# SPDX-License-Identifier: Apache-2.0
"""The picture of the orders in the documentation shows every order, and each as it is."""

import importlib.util
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

from mar_hf.generation import GENERATION_ORDERS


@pytest.fixture
def panels():
    path = Path(__file__).parents[1] / "utils" / "draw_orders.py"
    spec = importlib.util.spec_from_file_location("draw_orders", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figure = module.draw_orders()
    yield {axes.get_title(): axes for axes in figure.axes}
    plt.close(figure)


def test_the_picture_shows_every_order_as_it_is(panels):
    assert list(panels) == list(GENERATION_ORDERS)
    for name in ("raster", "spiral", "zigzag", "checkerboard", "subsampled", "halton"):
        row_by_row = sorted(panels[name].texts, key=lambda text: text.get_position()[::-1])
        ranks = torch.tensor([int(text.get_text()) for text in row_by_row])
        assert panels[name].yaxis_inverted()
        assert torch.equal(ranks.argsort(), GENERATION_ORDERS[name](8, 8))

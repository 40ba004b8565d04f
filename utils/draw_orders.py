# SPDX-License-Identifier: Apache-2.0
"""Draws the generation orders for docs/concepts.md: `python utils/draw_orders.py`. Needs matplotlib."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # before pyplot: it also draws on a machine without a screen
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mar_hf.generation import GENERATION_ORDERS, random_ratio


DST = Path(__file__).resolve().parent.parent / "docs" / "images" / "orders.png"
SIDE = 8
COLORS = plt.get_cmap("YlGnBu")


def draw_order(axes: Axes, order: torch.Tensor) -> None:
    """The grid, with the rank of every position as its colour and as a number, counted from 1."""
    ranks = 1 + order.argsort().view(SIDE, SIDE)
    axes.pcolormesh(ranks, cmap=COLORS, vmin=-6, edgecolors="white", linewidth=1.5)
    for row in range(SIDE):
        for column in range(SIDE):
            rank = ranks[row, column].item()
            color = "white" if rank > SIDE**2 / 2 else "black"
            axes.text(column + 0.5, row + 0.53, rank, ha="center", va="center", color=color)
    axes.invert_yaxis()
    axes.axis("off")


def draw_annealing(axes: Axes) -> None:
    """The share of random orders over the training. One order alone would look like another panel."""
    progress = [0, 0.5, 0.75, 1]
    ratio = [random_ratio(point) for point in progress]
    axes.fill_between(progress, ratio, color=COLORS(0.75), linewidth=0)
    axes.fill_between(progress[1:], ratio[1:], 1, color=COLORS(0.2), linewidth=0)
    axes.text(0.3, 0.5, "random", ha="center", va="center", color="white", fontsize=13)
    axes.text(0.84, 0.5, "raster", ha="center", va="center", fontsize=13)
    axes.set(xlim=(0, 1), ylim=(0, 1), yticks=[], xlabel="training →")
    axes.set_xticks(progress, ["0", "½", "¾", "1"])
    axes.spines[:].set_visible(False)


def draw_orders() -> Figure:
    """One panel for each entry of the table."""
    figure, panels = plt.subplots(2, -(-len(GENERATION_ORDERS) // 2), figsize=(15, 6.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
    for axes, (name, order) in zip(panels.flat, GENERATION_ORDERS.items(), strict=False):
        if name == "random_annealed":
            draw_annealing(axes)
        else:
            draw_order(axes, order(SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
        axes.set_box_aspect(1)
        axes.set_title(name, family="monospace", fontsize=13, fontweight="bold")
    for axes in panels.flat[len(GENERATION_ORDERS) :]:
        axes.remove()
    return figure


if __name__ == "__main__":
    draw_orders().savefig(DST, dpi=120, bbox_inches="tight", pad_inches=0.1)
    print(f"Wrote {DST}")

# SPDX-License-Identifier: Apache-2.0
"""Plots of results. matplotlib is imported when something is drawn; its global state is left alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from ..utils import atomic_file, import_extra
from .pictures import Pictures


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def saved_figure(path: str | PathLike, size: tuple[float, float], **settings: Any) -> Iterator["Figure"]:
    """A new figure that is written when the body ends: completely or not at all.

    Args:
        path (`str` or `os.PathLike`): of the PNG file.
        size (`tuple[float, float]`): in inches.
        settings (`Any`): for `Figure.savefig`.

    Yields:
        `matplotlib.figure.Figure`: to draw on; no window and no list of pyplot knows it.
    """
    figure = import_extra("matplotlib.figure", "eval").Figure(figsize=size)
    yield figure
    with atomic_file(path) as partial:
        figure.savefig(partial, **{"dpi": 110, **settings})


def draw_lines(
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    positions: Sequence[Any],
    xlabel: str,
    path: str | PathLike,
    levels: Mapping[str, Mapping[str, float]] | None = None,
    ylim: tuple[float, float] | None = None,
) -> None:
    """Numbers against one argument, a panel for each kind of number.

    Args:
        panels (`Mapping`): title -> name of each line -> its values; None leaves a gap.
        positions (`Sequence`): the argument's values, numbers or names.
        xlabel (`str`): what the argument is called.
        path (`str` or `os.PathLike`): of the PNG file.
        levels (`Mapping`, *optional*): title -> name -> a number to compare with, drawn as a dashed line.
        ylim (`tuple[float, float]`, *optional*): ends of the vertical axis.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with saved_figure(path, (11 / 3 * columns, 2.6 * rows)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, (title, lines) in zip(axes, panels.items()):
            for name, values in lines.items():
                axis.plot(positions, values, marker="o", label=name)
            styles = ("--", ":", "-.")
            for (name, value), style in zip((levels or {}).get(title, {}).items(), styles):
                axis.axhline(value, color="grey", linestyle=style, label=name)
            axis.set(title=title, xlabel=xlabel, **({} if ylim is None else {"ylim": ylim}))
            axis.grid(alpha=0.3)
        if max(map(len, panels.values())) > 1:
            axes[0].legend(fontsize=8)
        for axis in axes[len(panels) :]:
            axis.axis("off")
        figure.tight_layout()


def draw_neighbours(
    samples: Pictures,
    real: Pictures,
    order: Sequence[int],
    nearest: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    path: str | PathLike,
) -> None:
    """Some samples, each beside the real pictures nearest to it, with the distances.

    Args:
        samples (`Pictures`): to show.
        real (`Pictures`): their neighbours are among them.
        order (`Sequence[int]`): samples from the most interesting one to the least; 16 are shown, evenly spread.
        nearest (`Mapping`): name of each space -> distances and indices of the neighbours, see `nearest_neighbours`.
        path (`str` or `os.PathLike`): of the PNG file.
    """
    chosen = [order[index] for index in torch.linspace(0, len(order) - 1, min(16, len(order))).long().tolist()]
    width, rows = 1 + len(nearest), -(-len(chosen) // 4)
    size = (min(4, len(chosen)) * width, 1.25 * rows)
    with saved_figure(path, size, dpi=120) as figure:
        # One system of axes in inches for all pictures: one for each would take seconds.
        axis = figure.add_axes((0, 0, 1, 1))
        axis.axis("off")
        for place, number in enumerate(chosen):
            row, column = divmod(place, 4)
            shown = [(samples.image(number), "sample")]
            for title, (far, index) in nearest.items():
                shown.append((real.image(int(index[number])), f"{title} {far[number]:.3g}"))
            for offset, (image, title) in enumerate(shown):
                middle, top = column * width + offset + 0.5, 1.25 * row + 0.25
                right, down = (0.95 * side / max(image.size) for side in image.size)
                extent = (middle - right / 2, middle + right / 2, top + down, top)
                axis.imshow(image, interpolation="nearest", extent=extent)
                axis.text(middle, top - 0.03, title, fontsize=7, ha="center", va="bottom")
        axis.set(xlim=(0, size[0]), ylim=(size[1], 0))


def draw_bars(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float | None]]]],
    names: Sequence[str],
    path: str | PathLike,
    levels: Mapping[str, float] | None = None,
    starts: Mapping[str, float] | None = None,
) -> None:
    """Bars with deviations, a panel for each metric, several bars for each name.

    Args:
        panels (`Mapping`): title -> kind of bar -> mean and deviation (or None) for each name.
        names (`Sequence[str]`): what the rows of bars are called.
        path (`str` or `os.PathLike`): of the PNG file.
        levels (`Mapping[str, float]`, *optional*): title -> a number to compare with, drawn as a dashed line.
        starts (`Mapping[str, float]`, *optional*): title -> where the axis begins, instead of at 0.
    """
    with saved_figure(path, (5.5 * len(panels), 1.2 + 0.5 * len(names))) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, kinds) in zip(axes, panels.items(), strict=True):
            width = 0.8 / len(kinds)
            for place, (kind, values) in enumerate(kinds.items()):
                means, deviations = zip(*values, strict=True)
                places = [number + (place + 0.5) * width - 0.4 for number in range(len(names))]
                axis.barh(places, means, width, xerr=[value or 0 for value in deviations], capsize=2, label=kind)
            if levels and title in levels:
                axis.axvline(levels[title], color="grey", linestyle="--")
            axis.set(title=title, yticks=range(len(names)), yticklabels=names)
            axis.set_xlim(left=(starts or {}).get(title))
            axis.grid(axis="x", alpha=0.3)
        axes[0].invert_yaxis()
        axes[0].legend(fontsize=8)
        figure.tight_layout()


def draw_points(
    points: Mapping[str, tuple[float, float, float | None]], xlabel: str, ylabel: str, path: str | PathLike
) -> None:
    """Named points with deviations, on a logarithmic horizontal axis.

    Args:
        points (`Mapping`): name -> place, mean, and deviation (or None).
        xlabel (`str`): what the places are.
        ylabel (`str`): what the means are.
        path (`str` or `os.PathLike`): of the PNG file.
    """
    with saved_figure(path, (8, 5)) as figure:
        axis = figure.subplots()
        for name, (place, mean, deviation) in points.items():
            axis.errorbar(place, mean, yerr=deviation or 0, fmt="o", capsize=2)
            axis.annotate(name, (place, mean), (6, 4), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
        axis.margins(x=0.3, y=0.15)
        axis.grid(alpha=0.3)
        figure.tight_layout()


def draw_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float | None, str]]]],
    xlabel: str,
    ylabel: str,
    path: str | PathLike,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Curves through named points with deviations, on logarithmic axes, a panel for each group of curves.

    Args:
        panels (`Mapping`): title -> name of each curve -> its points: place, mean, deviation (or None), name.
        xlabel (`str`): what the places are.
        ylabel (`str`): what the means are.
        path (`str` or `os.PathLike`): of the PNG file.
        levels (`Mapping[str, float]`, *optional*): name -> a number to compare with, a dashed line in every panel.
    """
    ticker = import_extra("matplotlib.ticker", "eval")
    with saved_figure(path, (6.5 * len(panels), 5)) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            for number, (name, points) in enumerate(curves.items()):
                places, means, deviations, texts = zip(*points, strict=True)
                errors = [deviation or 0 for deviation in deviations]
                axis.errorbar(places, means, errors, marker="osD^v<>PX*"[number % 10], capsize=2, label=name)
                for place, mean, text in zip(places, means, texts, strict=True):
                    axis.annotate(text, (place, mean), (4, 4), textcoords="offset points", fontsize=7)
            for (name, value), style in zip((levels or {}).items(), ("--", ":", "-.")):
                axis.axhline(value, color="grey", linestyle=style, label=name)
            axis.set(xscale="log", yscale="log", title=title, xlabel=xlabel)
            for side in (axis.xaxis, axis.yaxis):  # 20 and 50 instead of powers of ten
                side.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                side.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
                side.set_minor_formatter(ticker.NullFormatter())
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=8)
        axes[0].set_ylabel(ylabel)
        figure.tight_layout()

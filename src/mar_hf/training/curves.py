# SPDX-License-Identifier: Apache-2.0
"""What shows how a run goes: curves as a table and a picture, and grids of samples."""

import csv
import os
import pathlib

from PIL import Image

from ..utils import atomic_file, import_extra


def write_curves(history: list[dict[str, float]], output_dir: str | os.PathLike) -> None:
    """Write `loss.csv` and `loss.png`.

    Args:
        history (`list[dict[str, float]]`): rows with `step` and numbers; those whose names end in `loss` are drawn.
        output_dir (`str` or `os.PathLike`): an existing folder.
    """
    folder = pathlib.Path(output_dir)
    names = list(dict.fromkeys(name for row in history for name in row))
    with atomic_file(folder / "loss.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)
    # Without pyplot: no backend is chosen, and no figure is kept.
    figure = import_extra("matplotlib.figure", "train").Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name in (name for name in names if name.endswith("loss")):
        rows = [row for row in history if name in row]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(folder / "loss.png") as path:
        figure.savefig(path, dpi=120, bbox_inches="tight")


def write_samples(grid: Image.Image, output_dir: str | os.PathLike, step: int) -> None:
    """Write `samples/step_<step>.png`.

    Args:
        grid (`PIL.Image.Image`): the samples.
        output_dir (`str` or `os.PathLike`): of the run.
        step (`int`): optimizer steps so far.
    """
    with atomic_file(pathlib.Path(output_dir, "samples", f"step_{step:06d}.png")) as path:
        grid.save(path)

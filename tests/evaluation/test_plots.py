# SPDX-License-Identifier: Apache-2.0
"""Plots: files that are whole or not there, and no trace in matplotlib's global state."""

import sys

import pytest
from PIL import Image

from mar_hf.evaluation.plots import draw_bars, draw_curves, draw_lines, draw_points, saved_figure


def draw_one_of_each(folder):
    panels = {"fid": {"a": [1.0, 2.0], "b": [2.0, None]}, "kid": {"a": [0.0, 0.1], "b": [0.2, 0.3]}}
    draw_lines(panels, [1, 2], "steps", folder / "lines.png", {"fid": {"real": 0.5}}, ylim=(0, 3))
    bars = {"fid": {"without": [(1.0, 0.1), (2.0, None)], "with": [(0.5, None), (0.75, None)]}}
    draw_bars(bars, ["first", "second"], folder / "bars.png", {"fid": 0.25}, {"fid": 0.1})
    draw_points({"first": (0.1, 1.0, 0.2), "second": (2.0, 1.5, None)}, "seconds", "fid", folder / "points.png")
    curves = {"mar": {"first": [(0.1, 9.0, 0.2, "1"), (2.0, 1.5, None, "8")]}, "ar": {"first": [(3.0, 20.0, 1.0, "")]}}
    draw_curves(curves, "seconds", "fid", folder / "curves.png", {"real": 1.0})


def test_each_is_a_picture(tmp_path):
    draw_one_of_each(tmp_path)
    sizes = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert sizes == {
        "lines.png": (806, 286),
        "bars.png": (605, 242),
        "points.png": (880, 550),
        "curves.png": (1430, 550),
    }


def test_no_figure_stays_open(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    draw_one_of_each(tmp_path)
    assert pyplot.get_fignums() == before


def test_a_plot_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), saved_figure(path, (2, 2)) as figure:
        figure.subplots()
        raise RuntimeError("no data")
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'`matplotlib` is needed here: pip install "mar_hf\[eval\]"'):
        draw_points({}, "x", "y", tmp_path / "plot.png")

# SPDX-License-Identifier: Apache-2.0
"""Sweeps: what words mean, and their plots."""

import pytest
from PIL import Image

from mar_hf.evaluation.sweeps import draw_sweep, parse_sweeps


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], []),
        (["temperature", "1", "0.9", "1"], [("temperature", 1.0), ("temperature", 0.9)]),
        (
            ["num_inference_steps", "2", "generation_order", "raster", "num_inference_steps", "4"],
            [("num_inference_steps", 2), ("num_inference_steps", 4), ("generation_order", "raster")],
        ),
    ],
)
def test_sweeps(words, expected):
    assert parse_sweeps(words) == expected


@pytest.mark.parametrize(
    "words, message",
    [
        (["seed", "1"], "`sweep` has to begin with one of num_inference_steps"),
        (["guidance_interval", "0.5"], "guidance_refresh, got 'guidance_interval'"),
        (["temperature", "hot"], "`sweep` of temperature has the value 'hot', no float"),
        (["num_inference_steps", "1.5"], "'1.5', no int"),
        (["temperature"], "`sweep` has no values for temperature"),
    ],
)
def test_words_that_are_no_sweeps(words, message):
    with pytest.raises(ValueError, match=message):
        parse_sweeps(words)


def test_a_plot_has_a_panel_for_each_metric(tmp_path):
    results = [
        {
            "sweep": "temperature",
            "value": value,
            "metrics": {"fid": value, "kid": 0.1, "recall": 0.5, "precision": 1.0},
        }
        for value in (1.0, 0.5)
    ]
    results.append({"sweep": None, "value": None, "metrics": {"fid": 3.0}})
    draw_sweep("temperature", results, {"fid": 0.1}, tmp_path / "sweep.png")
    assert Image.open(tmp_path / "sweep.png").size == (1210, 572)  # 3 columns, 2 rows at 110 dots an inch
    for result in results[:2]:
        del result["metrics"]["precision"]
    draw_sweep("temperature", results, {"fid": 0.1}, tmp_path / "sweep.png")
    assert Image.open(tmp_path / "sweep.png").height == 286

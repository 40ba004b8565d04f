# SPDX-License-Identifier: Apache-2.0
"""`examples/compare_heads.py`: a row in small, started again; equal sizes; what tables say of known numbers."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from mar_hf.evaluation import FEATURES
from snippets import ROOT


sys.path.insert(0, str(ROOT / "examples"))
import compare_heads  # noqa: E402
import draw_heads  # noqa: E402


class CoarsePixels(torch.nn.Module):
    """Pictures of 4 x 4: a Frechet distance of few numbers takes no time."""

    suffix = "_coarse"

    def __init__(self, weights=None):
        super().__init__()

    def forward(self, images):
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        return {"frechet": features, "kernel": features}


@pytest.fixture
def npz(tmp_path):
    """Ten pictures of each class, three of which are held out."""
    count = 10 * len(compare_heads.CLASSES)
    arrays = {"image": np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)}
    arrays |= {"label": np.arange(count) % len(compare_heads.CLASSES), "classes": compare_heads.CLASSES}
    arrays |= {"code": [f"1F{number:03X}" for number in range(count)], "toned": [False] * count}
    np.savez(tmp_path / "emoji.npz", **arrays)
    return str(tmp_path / "emoji.npz")


@pytest.mark.slow
def test_a_small_comparison_and_the_same_again(npz, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FEATURES, "coarse", CoarsePixels)
    folder, row = tmp_path / "out", "masked_diffusion"
    args = partial(compare_heads.Arguments, str(folder), npz=npz, features="coarse", quick=True, seeds=[0])
    compare_heads.main(args(only=[row]))
    first = capsys.readouterr().out
    parts = ["tokenizer-plain", f"training-{row}-0", f"scales-{row}", f"steps-{row}-0", f"speed-{row}"]
    assert [line.split()[1] for line in first.splitlines() if line[2:3] == ":"] == parts
    report = json.loads((folder / "heads.json").read_text(encoding="utf-8"))
    assert report["tokenizers"]["plain"]["real"]["fd"] != report["tokenizers"]["plain"]["reconstructions"]["fd"]
    found = report["rows"][row]
    assert found["guidance_scale"] in (1.0, 2.0) and found["parameters"] > found["head_parameters"] > 0
    assert [(point["head_steps"], point["num_seeds"]) for point in found["points"]] == [(1, 1), (2, 1)]
    for point in found["points"]:
        assert (
            point["fd"][0] > 0
            and point["alone"] > 0
            and 0 < point["head_share"] < 1
            and point["calls_a_token"] == point["head_steps"]
        )
    for name, lines in (("sizes", 1), ("heads", 4), ("steps", 1)):
        table = (folder / f"{name}.md").read_text(encoding="utf-8")
        assert table in first and len(table.splitlines()) == lines + 2
    for name in ("distance_time", "samples"):
        assert Image.open(folder / f"heads_{name}.png").width > 100

    # Nothing is done again but the tables; what is missing is done, and gives the same.
    compare_heads.main(args(only=[row]))
    assert capsys.readouterr().out == first[first.index("\n| row") :]
    (folder / "results" / f"steps-{row}-0.json").unlink()
    compare_heads.main(args(only=[row]))
    again = json.loads((folder / "heads.json").read_text(encoding="utf-8"))["rows"][row]
    assert again["points"] == found["points"]
    monkeypatch.setitem(compare_heads.QUICK_SIZES, "hidden_size", 32)
    compare_heads.model_config.cache_clear()
    with pytest.raises(ValueError, match="has a training of masked_diffusion with .*: remove its results"):
        compare_heads.main(args(only=[row]))
    compare_heads.model_config.cache_clear()
    with pytest.raises(ValueError, match="pictures made with quick True"):
        compare_heads.main(compare_heads.Arguments(str(folder), features="coarse"))


def test_models_are_of_the_same_size():
    sizes = {name: compare_heads.count_parameters(compare_heads.model_config(name)) for name in compare_heads.MODELS}
    assert max(sizes.values()) < 1.05 * min(sizes.values()), sizes


def test_the_width_is_the_nearest_one():
    settings = compare_heads.model_config(compare_heads.STANDARD)
    counts = [compare_heads.count_parameters(compare_heads.with_width(settings, width)) for width in (240, 256, 272)]
    assert counts == sorted(counts)
    assert compare_heads.find_width(settings, counts[1]) == 256
    assert compare_heads.find_width(settings, (counts[0] + counts[1]) // 2 - 1) == 240
    assert compare_heads.find_width(settings, 0) == compare_heads.WIDTHS[0]


METRICS = {"fd": 200.0, "kid": 0.5, "precision": 0.25, "recall": 0.75, "classifier_accuracy": 0.5}


def write_results(folder, row, distances):
    """Results of a row; Frechet distance by head steps for each seed."""
    (folder / "results").mkdir(exist_ok=True)
    shared = {"seconds": 120.0, "command": "", "parameters": 1000, "head_parameters": 100}
    shared["model_config"] = {"head_config": {"hidden_size": 8}}
    times = {steps: 0.01 * int(steps) for steps in distances[0]}
    found = {
        f"scales-{row}": {"guidance_scale": 1.5},
        f"speed-{row}": {
            "alone": times,
            "batch": times,
            "head_share": dict.fromkeys(times, 0.5),
            "calls_a_token": distances[0],
        },
        "tokenizer-plain": {"real": METRICS, "reconstructions": METRICS},
    }
    for seed, by_steps in enumerate(distances):
        found[f"training-{row}-{seed}"] = shared
        metrics = {steps: METRICS | {"fd": value} for steps, value in by_steps.items()}
        found[f"steps-{row}-{seed}"] = {"metrics": metrics}
    for name, result in found.items():
        (folder / "results" / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")


def test_tables_have_mean_and_deviation_of_the_seeds(tmp_path):
    row = "masked_diffusion"
    write_results(
        tmp_path, row, [{"1": 300.0, "2": 250.0, "4": 99.0}, {"1": 310.0, "4": 100.0}, {"1": 320.0, "4": 101.0}]
    )
    args = compare_heads.Arguments(str(tmp_path), only=[row])
    tokenizers = {"plain": {"real": METRICS, "reconstructions": METRICS}}
    report = {"seeds": args.seeds, "rows": {row: compare_heads.collect_row(args, row)}, "tokenizers": tokenizers}
    points = {point["head_steps"]: point for point in report["rows"][row]["points"]}
    assert points[1]["fd"] == [310.0, 10.0] and points[2]["fd"] == [250.0, None]
    # What only the first seed has measured is in the plot, not in the table.
    others = "0.50 ± 0.00 | 0.25 ± 0.00 | 0.75 ± 0.00 | 50.0 ± 0.0"
    assert draw_heads.quality_table(report).splitlines()[2:] == [
        f"| `masked_diffusion` | 1 | 300 | 310.0 ± 10.0 | {others} | 10.0 | 10.0 | 50% |",
        f"| `masked_diffusion` | 4 | 99 | 100.0 ± 1.0 | {others} | 40.0 | 40.0 | 50% |",
        "| real pictures |  |  | 200.0 | 0.50 | 0.25 | 0.75 | 50.0 |  |  |  |",
        "| reconstructions, plain |  |  | 200.0 | 0.50 | 0.25 | 0.75 | 50.0 |  |  |  |",
    ]
    lines = draw_heads.steps_table(report).splitlines()
    assert lines[0] == "| head steps | 1 | 2 | 4 |" and lines[2:] == ["| `masked_diffusion` | 310.0 | 250.0 | 100.0 |"]
    assert draw_heads.size_table(report).splitlines()[2] == (
        "| `masked_diffusion` | masked, random order | plain | diffusion | 8 | 100 | 1,000 | 2.0 |  | 1.5 |"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ["mar"]}, r"`only` has to name some of .*masked_diffusion.*, got \['mar'\]"),
        ({"only": []}, "`only` has to name some of"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"jobs": 0}, "`jobs` has to be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        compare_heads.Arguments("out", **settings)

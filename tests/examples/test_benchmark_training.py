# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the training step, with a tiny model."""

import json
import sys
from statistics import median

import pytest
import torch

from example_runs import SIZES
from snippets import ROOT


sys.path.insert(0, str(ROOT / "benchmarks"))

import benchmark_training  # noqa: E402


@pytest.mark.parametrize(
    "latents, resolution, num_tokens, accumulated", [("pixels", 8, 16, 2), ("kl16", 64, 16, 1)], ids=["pixels", "kl16"]
)
def test_both_steps_are_timed(tmp_path, capsys, latents, resolution, num_tokens, accumulated):
    config, output = tmp_path / "config.json", tmp_path / "results.jsonl"
    settings = {"resolution": resolution, "patch_size": 2, "model_config": SIZES, "train_batch_size": 2}
    config.write_text(json.dumps({**settings, "random_flip": True, "gradient_accumulation_steps": accumulated}))
    output.write_text("before\n", encoding="utf-8")
    words = ["--config", str(config), "--latents", latents, "--repeats", "3", "--output", str(output)]
    benchmark_training.main([*words, "--seed", "3"])
    printed = capsys.readouterr().out
    before, line = output.read_text(encoding="utf-8").splitlines()
    result = json.loads(line)
    assert before == "before"
    assert result["words"] == ["--config", str(config), "--seed", "3"]
    assert (result["num_tokens"], result["batch_size"]) == (num_tokens, 2 * accumulated)
    assert result["versions"]["torch"] == torch.__version__ and result["machine"]["cores"] > 0
    seconds = result["seconds"]
    for kind in ("bare step", "training step", "data"):
        assert len(seconds[kind]) == 3 and min(seconds[kind]) > 0
        assert printed.count(f"| {kind} | ") == 1
    assert all(data < step for data, step in zip(seconds["data"], seconds["training step"], strict=True))
    pairs = zip(seconds["training step"], seconds["bare step"], strict=True)
    assert result["overhead"] == pytest.approx(median(step / bare for step, bare in pairs) - 1)
    assert result["pictures_per_second"]["bare step"] == pytest.approx(2 * accumulated / median(seconds["bare step"]))


def test_too_few_repeats_and_unknown_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`--repeats` has to be at least 2, got 1\."):
        benchmark_training.main(["--repeats", "1"])
    with pytest.raises(ValueError, match="--no_such_setting"):
        benchmark_training.main(["--no_such_setting", "1"])

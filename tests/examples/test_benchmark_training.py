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

import training  # noqa: E402


@pytest.mark.parametrize(
    "latents, resolution, num_tokens, accumulated", [("pixels", 8, 16, 2), ("kl16", 64, 16, 1)], ids=["pixels", "kl16"]
)
def test_both_steps_are_timed(tmp_path, capsys, latents, resolution, num_tokens, accumulated):
    config, output = tmp_path / "config.json", tmp_path / "results.jsonl"
    settings = {"resolution": resolution, "patch_size": 2, "model_config": SIZES, "train_batch_size": 2}
    config.write_text(json.dumps({**settings, "random_flip": True, "gradient_accumulation_steps": accumulated}))
    output.write_text("before\n", encoding="utf-8")
    words = ["--config", str(config), "--latents", latents, "--repeats", "3", "--output", str(output)]
    training.main([*words, "--seed", "3"])
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


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_plain_reference_is_timed_in_turns(tmp_path, capsys, precision):
    config, output = tmp_path / "config.json", tmp_path / "results.jsonl"
    config.write_text(json.dumps({"resolution": 64, "model_config": SIZES, "train_batch_size": 3}))
    words = ["--config", str(config), "--mixed_precision", precision, "--seed", "1"]
    words += ["--gradient_accumulation_steps", "2"]
    mine = ["--latents", "kl16", "--repeats", "2", "--reference", "--no-memory", "--output", str(output)]
    training.main([*mine, *words])
    result, printed = json.loads(output.read_text(encoding="utf-8")), capsys.readouterr().out.splitlines()
    seconds = result["seconds"]
    pairs = zip(seconds["plain step"], seconds["training step"], strict=True)
    assert result["ratios"] == [plain / ours for plain, ours in pairs] and len(result["ratios"]) == 2
    assert result["ratio"] == median(result["ratios"])
    limits = {"no": (0, 1e-5), "bf16": (1e-6, 0.1)}[precision]
    assert limits[0] <= result["difference"] < limits[1]
    # The head of the reference sees all tokens, ours the masked ones.
    assert result["operations"]["plain step"] > result["operations"]["training step"] > 0
    assert printed[-1] == f"ratio {result['ratio']:.2f}"


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_a_process_says_what_memory_one_kind_of_step_takes(tmp_path, capsys, kind):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"resolution": 64, "model_config": SIZES, "train_batch_size": 3}))
    training.main(["--config", str(config), "--latents", "kl16", "--only", kind])
    assert json.loads(capsys.readouterr().out)["peak_memory_mb"] > 50


@pytest.mark.parametrize("preset", training.PRESETS)
def test_presets_are_settings_of_the_training_script(preset):
    args = training.parse_arguments(training.TrainingArguments, ["--output_dir", "out", *training.PRESETS[preset]])
    assert json.loads(args.model_config) == {"preset": "base"} and args.train_batch_size == 8


def test_too_few_repeats_and_unknown_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`--repeats` has to be at least 2, got 1\."):
        training.main(["--repeats", "1"])
    with pytest.raises(ValueError, match="--no_such_setting"):
        training.main(["--no_such_setting", "1"])

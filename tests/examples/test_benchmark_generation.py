# SPDX-License-Identifier: Apache-2.0
"""The benchmark of generation, with tiny pipelines: what it measures, and that it ends in the ratio."""

import inspect
import json
import logging
import math
import sys
from statistics import median

import pytest
import torch
from PIL import Image

from mar_hf import MARConfig, MARPipeline
from snippets import ROOT
from tiny_pipelines import tiny_kl, tiny_pipeline


sys.path.insert(0, str(ROOT / "benchmarks"))

import scenarios  # noqa: E402
from measuring import PARTS, Memory, quiet  # noqa: E402

import generation  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline with an autoencoder."""
    path = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline(tiny_kl()).save_pretrained(path)
    return path


@pytest.fixture
def measure(folder, tmp_path, capsys):
    """Run the script: the records that it appends, and the lines that it prints."""

    def run(*words, model=folder, steps=("12", "6")):
        sizes = ["--num-inference-steps", steps[0], "--num-diffusion-steps", steps[1], "--matmul-size", "16"]
        output = tmp_path / "results.jsonl"
        generation.main(["--model", str(model), *sizes, "--output", str(output), *words])
        records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        return records, capsys.readouterr().out.splitlines()

    return run


def test_whole_calls_are_measured_by_part(measure):
    [record], printed = measure("--batch-size", "2", "--repeats", "3")
    assert record["image_size"] == [8, 8] and record["num_tokens"] == 16
    assert record["difference"]["equal"] and record["difference"]["ours"] < 1e-4
    assert len(record["ratios"]) == 3 and record["ratio"] == median(record["ratios"])
    for name, side in record["sides"].items():
        seconds, calls = side["seconds_per_image"], side["seconds_per_call"]
        total, tokens = seconds.pop("total"), seconds.pop("tokens")
        assert all(seconds[part] > 0 for part in PARTS) and math.isclose(sum(seconds.values()), total)
        assert side["whole_calls"] and math.isclose(tokens + seconds["vae"], total)
        assert len(calls) == 3 and math.isclose(sorted(calls)[1] / 2, total)
        operations = side["operations_per_image"]
        assert operations.pop("other") == 0 and min(operations.values()) > 0
        assert sum(line.startswith(f"{name}: 3 calls of ") for line in printed) == 1
    plain, ours = (record["sides"][name]["operations_per_image"] for name in ("plain", "ours"))
    assert plain["encoder"] == ours["encoder"] and plain["vae"] == ours["vae"] and plain["head"] > ours["head"]
    for part in (*PARTS, "tokens", "total"):
        assert sum(line.startswith(f"| {part} | ") for line in printed) == 1
    assert printed[-1] == f"ratio {record['ratio']:.2f}"
    assert record["versions"]["torch"] == torch.__version__ and record["machine"]["cores"] > 0
    assert record["matmul"]["float32"] > 0 and all(
        side["memory_mb"] is None or side["memory_mb"] >= 0 for side in record["sides"].values()
    )


def test_the_base_model_is_estimated_from_some_steps(measure, tmp_path):
    words = ["--preset", "mar-b-cpu", "--repeats", "2", "--plot", str(tmp_path / "plots" / "bars.png")]
    [record], printed = measure(*words)
    assert record["sampled_steps"] == 5 and not any(side["whole_calls"] for side in record["sides"].values())
    assert any(line.startswith("plain and ours estimated from 5 autoregressive steps") for line in printed)
    assert record["difference"]["equal"] and record["difference"]["ours"] < 1e-4
    for side in record["sides"].values():
        assert all(side["seconds_per_image"][part] > 0 for part in (*PARTS, "total"))
        assert side["settings"]["guidance_scale"] == 2.9
    assert printed[-1] == f"ratio {record['ratio']:.2f}"
    with Image.open(tmp_path / "plots" / "bars.png") as picture:
        assert picture.width > 400


@pytest.mark.parametrize("preset, steps", [("mar-b-cpu-fast", 50), ("mar-b-cpu-solver", 20)])
def test_what_gives_other_pictures_is_ours_only(measure, preset, steps):
    [record], printed = measure("--preset", preset, "--repeats", "1")
    plain, ours = record["sides"]["plain"], record["sides"]["ours"]
    assert (plain["settings"]["num_diffusion_steps"], ours["settings"]["num_diffusion_steps"]) == (6, steps)
    assert (plain["scheduler"], ours["scheduler"]) == ("TokenDDPMScheduler", record["scheduler"]["class"])
    assert (plain["dtype"], ours["dtype"]) == ("float32", record["dtype"])
    assert record["difference"] == {"equal": False}
    assert "outputs differ: ours has other settings" in printed and printed[-1].startswith("ratio ")


def test_ours_can_have_other_settings_from_the_command_line(measure):
    [record], _ = measure("--repeats", "1", "--sampled-steps", "2", "--ours", '{"num_inference_steps": 3}')
    steps = {name: side["settings"]["num_inference_steps"] for name, side in record["sides"].items()}
    assert steps == {"plain": 12, "ours": 3} and record["difference"] == {"equal": False}


def test_what_depends_on_all_steps_is_measured_whole(measure):
    words = ["--sampled-steps", "2", "--repeats", "1", "--ours", '{"guidance_refresh": 4}']
    [record], printed = measure(*words)
    assert {name: side["whole_calls"] for name, side in record["sides"].items()} == {"plain": False, "ours": True}
    assert (
        record["sides"]["ours"]["operations_per_image"]["encoder"]
        < (record["sides"]["plain"]["operations_per_image"]["encoder"])
    )
    assert any(line.startswith("plain estimated from 2 autoregressive steps") for line in printed)


def test_what_the_reference_does_not_know_is_refused(folder):
    scenario = {**scenarios.DEFAULTS, "model": str(folder), "settings": {"guidance_interval": [0, 1]}}
    generation.build_sides(scenario, reference=True)
    scenario["settings"] = {"context_noise": 0.5}
    with pytest.raises(ValueError, match="knows no `context_noise`, got 0.5"):
        generation.build_sides(scenario, reference=True)


@pytest.mark.slow
def test_our_pipeline_can_be_compiled(measure):
    words = ["--sampled-steps", "2", "--repeats", "1", "--compile", '{"backend": "eager"}']
    [record], printed = measure(*words)
    assert record["compile"] == {"backend": "eager"} and record["difference"]["ours"] < 1e-4
    assert record["sides"]["ours"]["warm_up"] > 0
    assert any(line.startswith("ours: ") and ", after a first that took " in line for line in printed)
    assert record["recompilations"] == 0 and "compiled graphs made after the warm-up: 0" in printed
    assert printed[-1].startswith("ratio ")


def test_half_precision_has_its_distance_from_float32(measure):
    [record], printed = measure("--preset", "mar-b-cpu-bf16", "--repeats", "1", "--sampled-steps", "2")
    assert not record["difference"]["equal"] and 1e-4 < record["difference"]["ours"] < 10
    assert any(line.endswith("in another precision") for line in printed)


@pytest.mark.slow
def test_the_table_of_a_gpu_is_one_command(measure, monkeypatch):
    monkeypatch.setitem(scenarios.GROUPS, "gpu-b", scenarios.GROUPS["gpu-b"][:3])
    # One of them compiles for CUDA graphs; here the same without a compiler.
    words = ["--device", "cpu", "--repeats", "2", "--compile", '{"backend": "eager"}']
    records, printed = measure("--preset", "gpu-b", *words, steps=("2", "2"))
    assert [record["batch_size"] for record in records] == [1, 1, 16]
    assert [record["scenario"].endswith("-compiled") for record in records] == [False, True, False]
    for record in records:
        assert record["recompilations"] == 0
        # Both precisions are compared with float32; whole calls are timed, and the parts of others.
        assert record["difference"].keys() == {"equal", "ours", "plain"} and not record["difference"]["equal"]
        assert {side["dtype"] for side in record["sides"].values()} == {"bfloat16"} == set(record["matmul"])
        assert all(side["whole_calls"] for side in record["sides"].values()) and len(record["ratios"]) == 2
        assert all(side["seconds_per_image"]["head"] > 0 for side in record["sides"].values())
        assert sum(line.startswith(f"| {record['scenario']} | ") for line in printed) == 1
    assert printed[-1] == f"ratio {min(record['ratio'] for record in records):.2f}"


def test_operators_of_a_head_step_are_counted(measure, folder):
    [record], printed = measure("--repeats", "1")
    counted = {name: side["kernels_per_head_step"] for name, side in record["sides"].items()}
    # Token, block, output: three layers, norms and modulations at least; the reference modulates in every step.
    layers = 3 * MARPipeline.from_pretrained(folder).transformer.config.head_config["num_layers"]
    assert layers < counted["ours"] < counted["plain"] / 1.5
    assert any(line.endswith(f"; {counted['ours']:.0f} operators a head step") for line in printed)
    [_, record], _ = measure("--repeats", "1", steps=("4", "1"))
    assert record["sides"]["ours"]["kernels_per_head_step"] is None


def test_the_head_alone_is_compared(measure):
    [record], printed = measure("--preset", "head-cpu", "--repeats", "1")
    plain, ours = (record["sides"][name]["seconds_per_image"]["head"] for name in ("plain", "ours"))
    assert record["ratio"] == pytest.approx(plain / ours)
    assert any(line.startswith("head: plain / ours") for line in printed)


def test_models_without_a_plain_form_are_measured_alone(measure, tmp_path):
    tiny_pipeline(backbone="ar").save_pretrained(tmp_path / "ar")
    with pytest.raises(ValueError, match="plain reference is of MAR"):
        measure("--repeats", "1", model=tmp_path / "ar")
    [record], printed = measure("--repeats", "1", "--no-reference", model=tmp_path / "ar")
    assert record["sides"].keys() == {"ours"} and "ratio" not in record
    assert record["sides"]["ours"]["seconds_per_image"]["decoder"] > 0
    assert not any(line.startswith("ratio") for line in printed)


def test_other_pictures_are_not_called_equal(folder):
    scenario = {**scenarios.DEFAULTS, "model": str(folder)}
    sides = generation.build_sides(scenario, reference=True)
    latents = torch.ones(1, 4, 4, 4)
    with pytest.raises(RuntimeError, match="differs from the plain reference: 1.0e-03"):
        generation.compare(sides, {"plain": latents, "ours": latents + 1e-3}, scenario)
    with pytest.raises(RuntimeError, match="nan"):
        generation.compare(sides, {"plain": latents, "ours": latents * math.nan}, scenario)


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_scenarios_say_what_can_be_measured(name):
    scenario = {**scenarios.DEFAULTS, **scenarios.SCENARIOS[name]}
    assert scenario.keys() == scenarios.DEFAULTS.keys()
    if scenario["model"] != "demo":
        config, full = (MARConfig.preset(scenario["model"], **one) for one in (scenario["model_settings"], {}))
        assert (config.hidden_size, config.head_config) == (full.hidden_size, full.head_config)
    assert {*scenario["settings"], *scenario["ours"]} <= set(inspect.signature(MARPipeline.__call__).parameters)
    assert scenario["part"] in (*PARTS, "tokens", "total") and scenario["repeats"] >= 1
    assert all(key in scenarios.__doc__ for key in scenario)


def test_groups_hold_scenarios():
    assert len(scenarios.GROUPS["gpu"]) == 18
    assert {scenarios.SCENARIOS[name].get("compile") is None for name in scenarios.GROUPS["gpu"]} == {True, False}
    assert all(name in scenarios.SCENARIOS for names in scenarios.GROUPS.values() for name in names)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--repeats", "0"], r"`--repeats` has to be at least 1, got 0\."),
        (["--batch-size", "0"], r"`--batch-size` has to be at least 1, got 0\."),
        (["--sampled-steps", "-1"], r"`--sampled-steps` has to be at least 0, got -1\."),
    ],
)
def test_impossible_numbers_are_refused(words, reason):
    with pytest.raises(ValueError, match=reason):
        generation.main(words)


def test_memory_is_what_a_call_adds():
    with Memory("cpu") as memory:
        torch.ones(25_000_000)
    assert memory.megabytes is None or 90 < memory.megabytes < 200


def test_warnings_come_back():
    logger = logging.getLogger("mar_hf")
    level = logger.level
    with quiet():
        assert logger.level == logging.ERROR
    assert logger.level == level

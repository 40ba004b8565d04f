# SPDX-License-Identifier: Apache-2.0
"""The benchmark of linear layers: both ways of each shape and preset are timed, and the rule is reported."""

import json
import sys

import pytest
import torch

from mar_hf.onednn import MKL_IS_NARROW, OneDNNLinear, winning_rows
from snippets import ROOT
from tiny_pipelines import tiny_pipeline


sys.path.insert(0, str(ROOT / "benchmarks"))

import layers  # noqa: E402


@pytest.fixture
def measure(tmp_path, capsys):
    """Run the script: its record, and the rows of its table."""

    def run(*words):
        output = tmp_path / "results.jsonl"
        layers.main([*words, "--output", str(output)])
        printed = capsys.readouterr().out.splitlines()
        return json.loads(output.read_text(encoding="utf-8"))["results"], printed[4:]

    return run


def test_layers_are_timed_both_ways_whatever_the_rule_says(measure, monkeypatch):
    timed = []

    def run(modules, states, calls):
        timed.append((len(states), isinstance(modules[0].linear, OneDNNLinear)))
        return original(modules, states, calls)

    original = layers.run
    monkeypatch.setattr(layers, "run", run)
    monkeypatch.setattr(layers, "SECONDS", 0)
    words = ["--shapes", "1024x1024", "16x8", "--rows", "1", "8", "--activation", "silu", "--repeats", "3"]
    results, printed = measure(*words)
    assert [(result["shape"], result["rows"]) for result in results] == [
        ("1024x1024", 1),
        ("1024x1024", 8),
        ("16x8", 1),
        ("16x8", 8),
    ]
    assert [result["rule"] for result in results] == ["torch", "oneDNN", "torch", "torch"]
    assert 8 in winning_rows(1024, 1024, torch.float32, MKL_IS_NARROW)
    assert all(len(result["ratios"]) == 3 and min(result["ratios"]) > 0 for result in results)
    for rows in (1, 8):
        assert timed.count((rows, True)) == 6 and timed.count((rows, False)) == 8
    assert len(printed) == 4 and printed[1].startswith("| 1024x1024 | 8 | oneDNN | 3 | ")


def test_presets_are_timed_with_onednn_and_without(measure, monkeypatch, tmp_path):
    folder, enabled = tmp_path / "pipeline", []
    tiny_pipeline().save_pretrained(folder)
    monkeypatch.setitem(layers.SCENARIOS, "demo-cpu", {"model": str(folder)})
    generate = layers.Side.generate

    def spied(self, plan, recorder):
        enabled.append(torch.backends.mkldnn.enabled)
        generate(self, plan, recorder)

    monkeypatch.setattr(layers.Side, "generate", spied)
    [result], printed = measure("--presets", "demo-cpu", "--batch-size", "2", "--repeats", "2")
    assert result["batch"] == 2 and len(result["ratios"]) == 2 and min(result["ratios"]) > 0
    assert enabled == [True, False, True, False, False, True] and torch.backends.mkldnn.enabled
    assert len(printed) == 1 and printed[0].startswith("| demo-cpu | 2 | 2 | ")

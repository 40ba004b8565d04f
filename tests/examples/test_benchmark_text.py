# SPDX-License-Identifier: Apache-2.0
"""The benchmark of texts: it runs, and its parts add up."""

import importlib.util
import json

import pytest

from snippets import ROOT


pytestmark = pytest.mark.slow


def test_it_measures_both_models_and_keeps_a_record(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_text", ROOT / "benchmarks" / "text.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    words = ["--layers", "1", "--text-encoder", "small", "--text-tokens", "3", "--repeats", "1"]
    words += ["--num-inference-steps", "2", "--num-diffusion-steps", "2", "--output", str(tmp_path / "r.jsonl")]
    benchmark.main(words)
    record = json.loads((tmp_path / "r.jsonl").read_text())
    seconds = record["seconds"]
    assert all(value > 0 for value in seconds.values())
    once = sum(seconds[part] for part in benchmark.PARTS)
    assert once + record["cross-attention"] == pytest.approx(seconds["with texts"] - seconds["without texts"])
    assert record["parameters"]["with"] > record["parameters"]["without"]
    assert f"| with texts | {seconds['with texts']:.3f} | 100.0% |" in capsys.readouterr().out

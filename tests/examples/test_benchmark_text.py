# SPDX-License-Identifier: Apache-2.0
"""The benchmark of texts: it runs, and its parts add up."""

import importlib.util
import json
import sys

import pytest

from mar_hf import MARConfig
from snippets import ROOT


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sampled", ["0", "1"])
def test_it_measures_both_models_and_keeps_a_record(tmp_path, monkeypatch, capsys, sampled):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_text", ROOT / "benchmarks" / "text.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    # Sizes beside the released ones, which take seconds.
    small = {"hidden_size": 32, "num_attention_heads": 2, "head_config": {"num_layers": 1, "hidden_size": 32}}
    monkeypatch.setitem(MARConfig.presets, "tiny", small)
    monkeypatch.setitem(benchmark.TEXT_ENCODERS, "tiny", {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 1})
    monkeypatch.setitem(sys.modules["measuring"].KL16, "block_out_channels", (32,) * 5)
    words = ["--model", "tiny", "--layers", "1", "--text-encoder", "tiny", "--text-tokens", "3", "7", "--repeats", "1"]
    words += ["--num-inference-steps", "2", "--num-diffusion-steps", "2", "--output", str(tmp_path / "r.jsonl")]
    benchmark.main([*words, "--sampled-steps", sampled])
    record = json.loads((tmp_path / "r.jsonl").read_text())
    assert record["seconds"] > 0 and [text["tokens"] for text in record["texts"]] == [3, 7]
    for text in record["texts"]:
        once = [text[part] for part in benchmark.PARTS]
        assert min(once) > 0
        assert sum(once) + text["cross-attention"] == pytest.approx(text["added"])
        (call,) = record["calls"][str(text["tokens"])]
        assert call == pytest.approx(record["seconds"] + text["added"])
    assert record["parameters"][1] > record["parameters"][0]
    printed = capsys.readouterr().out
    assert f"{record['seconds']:.2f} s without texts" in printed and "\n| 7 | " in printed
    assert ("of the steps measured" in printed) == (sampled == "1")

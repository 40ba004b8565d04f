# SPDX-License-Identifier: Apache-2.0
"""The benchmark of texts: it runs, and its parts add up."""

import importlib.util
import json
import sys

import pytest

from snippets import ROOT


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sampled", ["0", "1"])
def test_it_measures_both_models_and_keeps_a_record(tmp_path, monkeypatch, capsys, sampled):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_text", ROOT / "benchmarks" / "text.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    # The released autoencoder takes seconds for a picture.
    monkeypatch.setitem(sys.modules["measuring"].KL16, "block_out_channels", (32,) * 5)
    words = ["--layers", "1", "--text-encoder", "small", "--text-tokens", "3", "7", "--repeats", "1"]
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

# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the causal model's cache: it runs, and says what it measured."""

import importlib.util
import json

import pytest

from snippets import ROOT


pytestmark = pytest.mark.slow


def test_it_measures_every_position_and_keeps_a_record(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_cache", ROOT / "benchmarks" / "cache.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    words = ["--layers", "1", "--positions", "0", "9", "--repeats", "1", "--output", str(tmp_path / "r.jsonl")]
    benchmark.main(words)
    record = json.loads((tmp_path / "r.jsonl").read_text())
    rows = record["milliseconds"]
    assert [row["position"] for row in rows] == [0, 9] and record["layers"] == 1
    assert all(row[kind] > 0 for row in rows for kind in ("dynamic", "static", "none"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "| 9 | {dynamic:.1f} | {static:.1f} | {none:.1f} |".format(**rows[1])

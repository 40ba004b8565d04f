# SPDX-License-Identifier: Apache-2.0
"""The benchmark of loading: a tiny model in processes of its own."""

import json
import math
import sys

import pytest
import torch

from common import tiny_model
from snippets import ROOT


sys.path.insert(0, str(ROOT / "benchmarks"))

import loading  # noqa: E402
from measuring import measure_alone  # noqa: E402


@pytest.mark.slow
def test_both_ways_load_the_same_in_processes_of_their_own(tmp_path, capsys):
    held = torch.ones(250_000_000)  # 1000 MB, more than the libraries take
    assert held[-1] == 1
    model, output = tiny_model(), tmp_path / "results.jsonl"
    model.save_pretrained(tmp_path / "tiny")
    loading.main(["--folder", str(tmp_path / "tiny"), "--repeats", "1", "--output", str(output)])
    record = json.loads(output.read_text(encoding="utf-8"))
    checksum = sum(parameter.double().sum().item() for parameter in model.parameters())
    size = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
    # Elsewhere the system tells the peak of this process, too.
    most = held.nbytes / 1e6 if sys.platform == "linux" else math.inf
    for way in ("ours", "plain"):
        [load] = record["loads"][way]
        assert load["checksum"] == pytest.approx(checksum) and load["weights_mb"] == pytest.approx(size)
        assert 0 < load["load"] < load["ready"] and load["import"] > 0.1 and 50 < load["peak_mb"] < most
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"| tiny | {way} | ") for line in printed for way in ("ours", "plain")) == 2
    assert printed[-1] == f"ratio {record['ratio']:.2f}"


def test_what_can_not_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`--repeats` has to be at least 1, got 0\."):
        loading.main(["--folder", str(tmp_path), "--repeats", "0"])


def test_a_process_that_fails_says_why(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nif len(sys.argv) > 1:\n    sys.exit('no such thing')\nprint('-')\nprint('{}')\n")
    assert measure_alone(str(script), []) == {}
    with pytest.raises(RuntimeError, match=r"script.py --only ours failed:\nno such thing"):
        measure_alone(str(script), ["--only", "ours"])

# SPDX-License-Identifier: Apache-2.0
"""What the scripts that measure refuse, they refuse in one line, and before they load or write anything."""

import pytest

from mar_hf.evaluation.experiments import run_script
from snippets import ROOT


@pytest.mark.parametrize(
    "script, words, line",
    [
        (
            "generate",
            "--pretrained_model_name_or_path none --batch_size 0",
            "`batch_size` has to be at least 1, got 0.",
        ),
        ("evaluate", "--reference nowhere --samples_dir x", "`reference` 'nowhere' does not exist."),
        ("evaluate", "--reference .", "Give either `pretrained_model_name_or_path` or `samples_dir`."),
        (
            "evaluate_texts",
            "--pretrained_model_name_or_path none --data_dir . --num_prompts 0",
            "`num_prompts` has to be at least 1, got 0.",
        ),
        ("measure_speed", "--reference . --num_rounds 1", "`num_rounds` has to be at least 2, got 1."),
        ("compare_orders", "--jobs 0", "`jobs` has to be at least 1, got 0."),
        ("compare_heads", "--npz none", "`npz` 'none' does not exist."),
        ("draw_heads", "", "`output_dir` 'out' has no heads.json: run compare_heads.py first."),
        ("draw_comparison", "", "`output_dir` 'out' has no comparison.json: run compare_orders.py first."),
    ],
)
def test_it_is_one_line(script, words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        run_script(ROOT / "examples" / f"{script}.py", ["--output_dir", "out", *words.split()])
    assert refused.value.code == 2
    assert capsys.readouterr().err == f"{script}.py: error: {line}\n"
    assert list(tmp_path.iterdir()) == []

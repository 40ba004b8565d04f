# SPDX-License-Identifier: Apache-2.0
"""Parts of experiments: results with their logs, programs in this process, tasks side by side."""

import json
import logging
import pathlib
import sys
from functools import partial

import pytest

from mar_hf.evaluation.experiments import once, read_result, run_all, run_script


def test_tasks_run_side_by_side_and_failures_are_told(tmp_path):
    files = [tmp_path / str(number) for number in range(3)]
    run_all([partial(pathlib.Path.touch, file) for file in files], 2)
    assert all(file.exists() for file in files)
    for jobs in (1, 2):
        with pytest.raises(FileExistsError):
            run_all([partial(pathlib.Path.touch, files[0], exist_ok=False)], jobs)


def find(number):
    sys.stdout.write(f"looking for {number}\n")
    logging.getLogger("search").warning("not far")
    return {"found": number}


def test_a_result_has_its_time_and_its_log(tmp_path, capsys):
    once(tmp_path, "a", find, 3)
    assert capsys.readouterr().out.endswith(" a\n")
    result = json.loads((tmp_path / "results" / "a.json").read_text(encoding="utf-8"))
    assert result["found"] == 3 and result["seconds"] >= 0
    assert read_result(tmp_path, "a") == result
    once(tmp_path, "a", find, 4)  # it is there
    assert read_result(tmp_path, "a") == result
    assert (tmp_path / "logs" / "a.log").read_text(encoding="utf-8") == "looking for 3\nnot far\n"
    assert capsys.readouterr().out == ""


def test_a_part_that_fails_has_no_result(tmp_path):
    with pytest.raises(ZeroDivisionError):
        once(tmp_path, "a", lambda: 1 / 0)
    assert [path.name for path in tmp_path.rglob("a.*")] == ["a.log"]


def test_a_program_sees_its_words_and_nothing_stays_changed(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n", encoding="utf-8")
    before = sys.argv
    assert run_script(script, ["--a", "b c", 3]) == f"{tmp_path.name}/script.py --a 'b c' 3"
    assert capsys.readouterr().out == "['--a', 'b c', '3']\n" and sys.argv is before
    script.write_text("raise SystemExit(2)", encoding="utf-8")
    with pytest.raises(SystemExit):
        run_script(script, [])
    assert sys.argv is before

# SPDX-License-Identifier: Apache-2.0
"""Settings from files and the command line, what is refused, and that programs do so before they import anything."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from mar_hf.training import arguments as training
from mar_hf_settings import check_paths, check_types, load_module, parse_arguments, run_program
from snippets import ROOT


SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "sklearn", "mar_hf")
# Starts every script with some words, and says what came of it and which heavy libraries that took.
START_ALL = f"""
import contextlib, io, json, runpy, sys
answers = []
for sys.argv in json.load(sys.stdin):
    code = None
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    answers.append([code, out.getvalue(), err.getvalue(), [name for name in {HEAVY} if name in sys.modules]])
print(json.dumps(answers))
"""


@dataclass
class Settings:
    data: str = field(metadata={"help": "where"})
    rate: float = field(default=0.5, metadata={"help": "how much"})
    sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "how large"})
    flip: bool = field(default=False, metadata={"help": "whether"})
    extra: str = field(default="{}", metadata={"help": "JSON"})
    name: str | None = field(default=None, metadata={"help": "which"})


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.json", '{"data": "d", "rate": 1e-3, "sizes": [2, 3], "flip": true, "extra": {"a": [1]}, "name": null}'),
        ("s.yaml", "data: d\nrate: 1e-3\nsizes: [2, 3]\nflip: true\nextra: {a: [1]}\n"),
    ],
)
def test_settings_come_from_a_file_and_the_command_line_overrides_it(tmp_path, name, text):
    config = write(tmp_path / name, text)
    settings = parse_arguments(Settings, ["--config", config, "--rate", "2"])
    assert settings == Settings("d", 2.0, [2, 3], True, '{"a": [1]}', None)
    assert parse_arguments(Settings, ["--data", "e", "--config", config, "--flip", "false"]).data == "e"
    assert parse_arguments(Settings, ["--data", "x"]) == Settings("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": "d", "speed": 1}', r"unknown settings \['speed'\]; known are \['data', "),
        ('["data"]', "unknown settings list"),
        ('{"data": ', "can't be read"),
    ],
)
def test_a_wrong_file_of_settings_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(Settings, ["--config", write(tmp_path / "s.json", text)])
    with pytest.raises(ValueError, match="`config` 'nowhere.json' can't be read"):
        parse_arguments(Settings, ["--config", "nowhere.json"])


def test_switches_need_no_value_and_dashes_are_as_good():
    assert parse_arguments(Settings, ["--data", "x", "--flip"]).flip
    assert parse_arguments(Settings, ["--data", "x", "--flip", "No"]).flip is False
    with pytest.raises(ValueError, match="argument --flip: has to be true or false, got 'maybe'"):
        parse_arguments(Settings, ["--data", "x", "--flip", "maybe"])
    assert training.TrainingArguments("x", "d") == parse_arguments(
        training.TrainingArguments, ["--output-dir", "x", "--train_data_dir=d"]
    )


def test_help_tells_what_there_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(Settings, ["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert "--data DATA where" in listed and "how much (default: 0.5)" in listed and "--config FILE" in listed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "1"], "the following arguments are required: --data"),
        (["--data", "x", "--rat", "1"], r"unknown options \['--rat', '1'\] did you mean --rate\? \(see --help\)"),
        (["--data", "x", "--rate", "fast"], "argument --rate: invalid float value: 'fast'"),
        (["--data", "x", "--sizes"], "argument --sizes: expected at least one argument"),
    ],
)
def test_a_wrong_command_line_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(Settings, words)


def test_types_are_checked():
    check_types(Settings("x", rate=1, name="y"))
    for name, value, allowed in (
        ("rate", float("nan"), "a finite number, got nan"),
        ("sizes", [1, True], r"a list, each entry a whole number, got \[1, True\]"),
        ("flip", 1, "true or false, got 1"),
        ("name", 2, "a text, got 2"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` has to be {allowed}"):
            check_types(Settings(**{"data": "x", name: value}))


def test_paths_exist(tmp_path):
    check_paths(Settings(str(tmp_path)), "data", "name")
    with pytest.raises(ValueError, match="`data` '.*nowhere' does not exist"):
        check_paths(Settings(str(tmp_path / "nowhere")), "data", "name")


def test_scripts_have_their_names_before_their_errors(tmp_path, monkeypatch, capsys):
    @dataclass
    class Settings:
        number: int = 1

    def refuse(settings):
        raise error

    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py"), "--number", "3"])
    for error in (ValueError("a\n b"), OSError("no space"), ImportError("no module")):
        with pytest.raises(SystemExit) as stopped:
            run_program(refuse, Settings)
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"script.py: error: {' '.join(str(error).split())}\n"
    error = KeyError("a fault of ours")
    with pytest.raises(KeyError):
        run_program(refuse, Settings)
    numbers = []
    run_program(lambda settings: numbers.append(settings.number), Settings)
    assert numbers == [3]


def start_all(commands):
    start = [sys.executable, "-c", START_ALL]
    done = subprocess.run(start, input=json.dumps(commands), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_scripts_answer_before_they_import_what_takes_seconds(tmp_path):
    answers = start_all([[str(script), word] for script in SCRIPTS for word in ("--help", "--nosuch")])
    for script, helped, refused in zip(SCRIPTS, answers[::2], answers[1::2], strict=True):
        code, out, err, heavy = helped
        assert (code, err, heavy) == (0, "", []) and out.startswith(f"usage: {script.name} "), script
        code, out, err, heavy = refused
        assert (code, out, heavy) == (2, "", []), script
        assert err.startswith(f"{script.name}: error: ") and err.count("\n") == 1, script


def test_values_and_paths_are_refused_as_early(tmp_path):
    nowhere, out = str(tmp_path / "nowhere"), ["--output_dir", str(tmp_path / "out")]
    cases = [
        ("train", ["--train_batch_size", "0"], "`train_batch_size` has to be at least 1, got 0."),
        ("train", ["--train_data_dir", nowhere], f"`train_data_dir` {nowhere!r} does not exist."),
        ("train", ["--config", nowhere], f"`config` {nowhere!r} can't be read: "),
        ("train_tokenizer", ["--autoencoder", "x"], "`autoencoder` has to be one of ['kl', 'dc', 'vq'], got 'x'."),
        ("generate", ["--pretrained_model_name_or_path", "m", "--dtype", "int3"], "argument --dtype: invalid choice"),
        ("evaluate", ["--reference", nowhere, "--samples_dir", "x"], f"`reference` {nowhere!r} does not exist."),
        ("measure_speed", ["--reference", ".", "--num_rounds", "1"], "`num_rounds` has to be at least 2, got 1."),
        ("compare_orders", ["--only", "x"], "`only` has to name some of "),
    ]
    answers = start_all([[str(ROOT / "examples" / f"{name}.py"), *out, *words] for name, words, _ in cases])
    for (name, _, message), (code, out, err, heavy) in zip(cases, answers, strict=True):
        assert (code, out, heavy, err.count("\n")) == (2, "", [], 1), err
        assert err.startswith(f"{name}.py: error: {message}"), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "answer"),
    [
        (["--help"], 0, "usage: mar_hf.training "),
        (["tokenizer", "--help"], 0, "usage: mar_hf.training "),
        (
            ["--output_dir", "x", "--seeed", "1"],
            2,
            "mar_hf.training: error: unknown options ['--seeed', '1'] ",
        ),
        (["toknizer"], 2, "mar_hf.training: error: 'toknizer' is none of model, tokenizer, text_encoder, latents"),
    ],
)
def test_the_module_answers_before_the_package_is_imported(tmp_path, monkeypatch, words, code, answer):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')", encoding="utf-8")
    (tmp_path / "diffusers.py").write_text("raise SystemExit('diffusers is imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    command = [sys.executable, "-m", "mar_hf.training", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, (done.stdout or done.stderr).startswith(answer)) == (code, True), done.stderr
    assert not done.stderr if code == 0 else done.stderr.count("\n") == 1


def test_a_module_that_is_read_early_is_a_copy():
    early = load_module("training.arguments")
    assert early.TrainingArguments is not training.TrainingArguments
    assert early.TrainingArguments("x").__dict__ == training.TrainingArguments("x").__dict__

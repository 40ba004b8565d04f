# SPDX-License-Identifier: Apache-2.0
"""The `mar-hf` command before it imports the package: what it answers at once, and that it does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mar_hf import demo, demo_checkpoint
from mar_hf.generation import DECODINGS as ALL_DECODINGS
from mar_hf_command import DECODINGS, LIMITS, SETTINGS, build_parser, main


DATA = Path(__file__).parent / "parity" / "data" / "mar-tiny"
HEAVY = ("torch", "numpy", "transformers", "diffusers", "mar_hf")

# Runs every command of a list, and says what came of it and which heavy libraries that took.
RUN_ALL = f"""
import contextlib, io, json, sys
from mar_hf_command import main
answers = []
for argv in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
    answers.append([code, out.getvalue(), err.getvalue(), [name for name in {HEAVY} if name in sys.modules]])
print(json.dumps(answers))
"""


def python(code, **options):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A buffered output, as users have it: what can't be written is found when it is flushed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", code], env=environment, **{**streams, **options})


DEMO = ["generate", "--demo"]
REFUSED = [
    (["--nosuch"], "required: COMMAND"),
    (["draw"], "invalid choice: 'draw'"),
    (["generate"], "one of the arguments MODEL --demo is required"),
    (["generate", "--demo", "photos"], "invalid choice: 'photos'"),
    ([*DEMO, "--nosuch"], "unrecognized arguments: --nosuch"),
    ([*DEMO, "--batch-size", "many"], "invalid int value: 'many'"),
    ([*DEMO, "--class-labels", "heart", "nosuch"], "'nosuch' is unknown; known are animal face, arrow or button"),
    ([*DEMO, "--class-labels", "35"], "35 is no class, there are 0..34"),
    ([*DEMO, "--class-labels", "\ud800"], "is no valid Unicode text"),
    ([*DEMO, "--prompt", "a \ud800"], "is no valid Unicode text"),
    ([*DEMO, "emoji", "--prompt", "a clock"], "knows classes only"),
    ([*DEMO, "text"], "knows no classes: give it a `--prompt`"),
    ([*DEMO, "--prompt", "x", "--class-labels", "heart"], "do not go together"),
    ([*DEMO, "--text-encoder", "x"], "goes with `--prompt`"),
    ([*DEMO, "--guidance-scale", "1e39"], "`--guidance-scale` is 1e+39, it has to lie in"),
    ([*DEMO, "--guidance-scale", "nan"], "`--guidance-scale` is nan"),
    ([*DEMO, "--temperature=-1"], "`--temperature` is -1.0, it has to lie in 0.0..1000.0"),
    ([*DEMO, "--num-images-per-class", "1" + "0" * 12], "`--num-images-per-class` is 1000000000000"),
    ([*DEMO, "--num-inference-steps", "0"], "`--num-inference-steps` is 0"),
    ([*DEMO, "--batch-size", "0"], "`--batch-size` is 0"),
    ([*DEMO, "--decoding", "fast"], "invalid choice: 'fast'"),
    ([*DEMO, "--seed", "1" * 5000], "invalid int value"),
    ([*DEMO, "--device", "meta"], "`--device` is 'meta', which cannot be used here"),
    ([*DEMO, "--device", "cuda:x"], "`--device` is 'cuda:x'"),
    ([*DEMO, "--output", "/"], "expected a file ending in .png"),
    ([*DEMO, "--output", "grid.jpg"], "expected a file ending in .png"),
    ([*DEMO, "--output", f"{__file__}/grid.png"], "is a file, no folder"),
    ([*DEMO, "--output-dir", __file__], "is a file, no folder"),
    (["generate", "./nosuch"], "there is no such folder, and it is no hub id"),
    (["generate", __file__], "a file; it has to be a folder or a hub id"),
    (["info", str(DATA)], "neither model_index.json nor config.json"),
    (["info", ""], "MODEL is ''"),
    (["generate", f"{demo_checkpoint()}/transformer"], "model_index.json is missing, so this is no whole pipeline"),
    (["info", "--demo", "\udcff"], "invalid choice"),
    (["convert", "nosuch", "dst"], "'nosuch': No such file"),
    (["convert", str(DATA), "dst"], "No such file"),
    (["convert", __file__, __file__], "it has to be a new folder"),
    (["convert", __file__, str(DATA)], "it has to be a new folder"),
    (["convert", __file__, f"{__file__}/dst"], "is a file, no folder"),
    (["convert", __file__, "dst", "--scaling-factor", "inf"], "`--scaling-factor` is inf"),
    (["convert", __file__, "dst", "--config", "nosuch.json"], "'nosuch.json': No such file"),
    (["export", "nosuch", "dst"], "SRC is 'nosuch', where there is no folder"),
    (["export", str(DATA), f"{__file__}/dst"], "is a file, no folder"),
]


def test_what_is_refused_without_a_model_is_refused_at_once(tmp_path):
    helps = [["--help"], ["generate", "--help"], ["convert", "--help"]]
    commands = [argv for argv, _ in REFUSED] + helps
    answers = json.loads(python(RUN_ALL, input=json.dumps(commands), check=True, cwd=tmp_path).stdout)
    for (argv, message), (code, out, err, heavy) in zip(REFUSED, answers, strict=False):
        assert (code, out, heavy) == (2, "", []), (argv, err)
        assert err.startswith("mar-hf: error: ") and err.count("\n") == 1 and message in err, (argv, err)
    for argv, (code, out, err, heavy) in zip(helps, answers[len(REFUSED) :], strict=True):
        assert (code, err, heavy) == (0, "", []) and out.startswith("usage: mar-hf"), argv
    assert list(tmp_path.iterdir()) == []


def test_the_module_of_demos_is_the_package_s_own():
    args = build_parser().parse_args(["info", "--demo"])
    args.check(args)
    assert args.model == demo_checkpoint()
    assert list(demo.DEMO_CHECKPOINTS) == ["emoji", "text"]


def test_the_decodings_are_the_package_s():
    assert list(DECODINGS) == list(ALL_DECODINGS)


def test_a_hub_id_is_looked_up_before_anything_is_imported(hub):
    answer = python(RUN_ALL, input=json.dumps([["generate", "org/nosuch"]]), check=True)
    ((code, out, err, heavy),) = json.loads(answer.stdout)
    assert (code, out, err.count("\n"), heavy) == (2, "", 1, [])
    assert "org/nosuch" in err


def test_an_interruption_is_one_line():
    code = """
import sys
from mar_hf_command import main

def interrupt(event, args):
    if event == "import" and args[0] == "mar_hf":
        raise KeyboardInterrupt

sys.addaudithook(interrupt)
sys.exit(main(["info", "--demo"]))
"""
    run = python(code)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "mar-hf: interrupted\n")


PRINT_HELP = "sys.exit(mar_hf_command.main(['--help']))"


def test_a_reader_that_goes_away_is_one_line():
    run = python(f"import os, sys, mar_hf_command; r, w = os.pipe(); os.close(r); os.dup2(w, 1); {PRINT_HELP}")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr.startswith("mar-hf: error: the standard output can't be written: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        run = python(f"import sys, mar_hf_command; {PRINT_HELP}", stdout=full)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1) and "No space left" in run.stderr


NUMBERS = st.one_of(st.integers().map(str), st.floats().map(str), st.text(max_size=8))
OPTIONS = st.one_of(
    st.tuples(st.sampled_from([f"--{name.replace('_', '-')}" for name in LIMITS] + ["--seed"]), NUMBERS),
    st.tuples(st.sampled_from(["--output", "--output-dir", "--device", "--text-encoder"]), st.text(max_size=300)),
    st.tuples(st.sampled_from(["--class-labels", "--prompt"]), st.text(max_size=8), st.text(max_size=8)),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(OPTIONS, max_size=4), st.sampled_from([["--demo"], ["--demo", "text"], ["./nosuch"], [__file__]]))
def test_no_arguments_break_the_checks(options, model):
    argv = ["generate", *model, *(f"{option[0]}={option[1]}" for option in options[:2] if len(option) == 2)]
    argv += [word for option in options[2:] for word in option]
    try:
        args = build_parser().parse_args(argv)
        args.check(args)
    except SystemExit as stop:
        assert stop.code == 2
    except (ValueError, OSError, ImportError) as error:
        assert str(error)
    else:
        assert args.output is not None or args.output_dir is not None
        for name in SETTINGS:
            value = getattr(args, name)
            assert value is None or LIMITS[name][0] <= value <= LIMITS[name][1]


def test_it_runs_from_the_package_too():
    from mar_hf import cli

    assert cli.main is main

# SPDX-License-Identifier: Apache-2.0
"""The documentation says what is true: its code runs, its commands and options exist, its links lead somewhere."""

import dataclasses
import inspect
import re
import runpy

import pytest

from mar_hf import MARPipeline, generation, training
from mar_hf.training import cache_latents
from mar_hf.training.programs import TRAINERS
from mar_hf_command import build_parser
from snippets import ROOT, blocks, commands


FOLDERS = ("docs", "examples", "benchmarks", "model_cards")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md")))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TOOLS = ("pip", "pytest")  # other people's, whose options are not ours to check


def known_options(words):
    """The options of a script, or of a module of the package, with `argparse` or a dataclass of settings."""
    if "mar_hf.training" in words:
        name = words[words.index("mar_hf.training") + 1]
        kind = TRAINERS["model" if name.startswith("--") else name] if name != "latents" else cache_latents
        return options_of(kind)
    script = ROOT / next(word for word in words if word.endswith(".py"))
    assert script.exists(), words
    source = script.read_text(encoding="utf-8")
    if found := re.search(r"run_trainer\((\w+)\)|run_cache\(\)", source):
        return options_of(getattr(training, found[1] or "cache_latents"))
    fields = re.findall(r"^    (\w+): [^=\n]+ = field\(", source, re.MULTILINE)
    fields += ["config"] if re.search(r"\b(run_program|parse_arguments)\(", source) else []
    return {f"--{name}" for name in fields} | set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))


def options_of(kind):
    """The options of a training, or of the cache."""
    arguments = training.LatentCacheArguments if kind is training.cache_latents else kind.arguments_class
    return {"--config", *(f"--{field.name}" for field in dataclasses.fields(arguments))}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_snippets_run(page, tmp_path, monkeypatch, hub):
    # From top to bottom: what a block defines, those below it may use.
    monkeypatch.chdir(tmp_path)
    names = {}
    for line, code in blocks(page, "python"):
        file = tmp_path / f"{page.stem}_{line}.py"
        file.write_text("\n" * (line - 1) + code, encoding="utf-8")
        names = {name: value for name, value in runpy.run_path(str(file), names).items() if not name.startswith("__")}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page):
    for words in commands(page):
        while words and re.match(r"\w+=", words[0]):  # a variable, mostly for this command only
            words = words[1:]
        if not words:
            continue
        if words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert set(words[1:]) <= set(targets), words
        elif words[0] == "mar-hf":
            build_parser().parse_args(words[1:])
        elif words[0] == "python" or words[:2] == ["accelerate", "launch"]:
            program = next(number for number, word in enumerate(words) if re.search(r"\.py$|^mar_hf\.", word))
            options = {word for word in words[program:] if word.startswith("--")}
            assert options <= known_options(words), options - known_options(words)
        else:
            assert words[0] in TOOLS, words


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
    for target in map("".join, targets):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_every_argument_of_the_pipeline_is_explained():
    arguments = list(inspect.signature(MARPipeline.__call__).parameters)[1:]
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in arguments if f"`{name}`" not in page] == []


@pytest.mark.parametrize("table", [name for name in vars(generation) if name.isupper()])
def test_every_entry_of_the_tables_is_explained(table):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{table}` |"))
    assert [name for name in getattr(generation, table) if f"`{name}`" not in row] == []

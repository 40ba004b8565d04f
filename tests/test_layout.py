# SPDX-License-Identifier: Apache-2.0
"""What holds for the package as a whole: its names, their places, and what the source must not do."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import mar_hf


ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src" / "mar_hf").rglob("*.py"))
BESIDE = [ROOT / "src" / name for name in ("mar_hf_command.py", "mar_hf_settings.py")]

# Class -> module, as users and old pickles of them know it. A class that moves breaks them: keep its old place too.
FROZEN_PATHS = {
    "MARConfig": "mar_hf.models.configuration_mar",
    "MARModel": "mar_hf.models.modeling_mar",
    "MARForImageGeneration": "mar_hf.models.modeling_mar",
    "DiffusionHead": "mar_hf.heads.head_diffusion",
    "TokenDDPMScheduler": "mar_hf.schedulers.scheduling_token_ddpm",
    "TokenFlowScheduler": "mar_hf.schedulers.scheduling_token_flow",
    "ImageTokenizerConfig": "mar_hf.tokenizers.configuration_image_tokenizer",
    "ImageTokenizer": "mar_hf.tokenizers.modeling_image_tokenizer",
    "MARPipeline": "mar_hf.pipelines.pipeline_mar",
}
HEAVY = ("datasets", "matplotlib", "torchvision", "timm", "scipy", "tensorboard", "gradio", "torchmetrics", "sklearn")


# The rooms, the highest first: an import points down this list, or stays inside its room.
ROOMS = [
    "cli",
    "evaluation",
    "training",
    "conversion",
    "pipelines",
    "models",
    "heads",
    "generation",
    "tokenizers",
    "schedulers",
    "demo",
    "hub",
    "onednn",
    "loading",
    "utils",
]
LONGEST_FUNCTION = 60  # lines of code, the docstring not counted


def own_imports(path):
    """The modules of the package that a file of it imports, as dotted names below `mar_hf`; for types too."""
    package = path.relative_to(ROOT / "src" / "mar_hf").with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "mar_hf"}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level], *([node.module] if node.module else [])])
            # `from . import x` and `from .room import module` may name modules.
            found |= {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
    return found


def module_of(name):
    """The file's own dotted name that an imported name belongs to."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT / "src" / "mar_hf" / Path(*parts[:end])
        if place.with_suffix(".py").exists():
            return ".".join(parts[:end])
        if place.is_dir():
            return ".".join([*parts[:end], "__init__"])
    raise AssertionError(f"{name} is no module of the package")


IMPORTS = {
    ".".join(path.relative_to(ROOT / "src" / "mar_hf").with_suffix("").parts): {
        module_of(name) for name in own_imports(path)
    }
    for path in SOURCES
    if path.parent.name != "mar_hf" or path.name != "__init__.py"
}


def dotted(node):
    """`torch.manual_seed` of the expression of that name; the last part only where the rest is no plain name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def banned(source, may_print=False):
    """Names in the source that library code must not use: fixed devices, global randomness, printing, torchvision."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in modules if name.split(".")[0] in ("torchvision", "timm", "random")]
        elif isinstance(node, ast.Attribute) and dotted(node) in ("np.random", "numpy.random", "torch.manual_seed"):
            found.append(dotted(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            found.append(".cuda")
        elif isinstance(node, ast.Call) and dotted(node.func) == "print" and not may_print:
            found.append("print")
    return found


def test_every_public_name_is_there_once():
    assert len(set(mar_hf.__all__)) == len(mar_hf.__all__)
    assert [name for name in mar_hf.__all__ if not hasattr(mar_hf, name)] == []
    assert FROZEN_PATHS.keys() - set(mar_hf.__all__) == set()


def test_diffusers_can_load_our_components():
    library = LOADABLE_CLASSES["mar_hf"]
    assert {"PreTrainedModel", "SchedulerMixin"} <= library.keys()
    for name, methods in library.items():
        for method in methods:
            assert callable(getattr(getattr(mar_hf, name), method)), (name, method)


@pytest.mark.parametrize("name, module", FROZEN_PATHS.items())
def test_component_paths_are_frozen(name, module):
    assert getattr(mar_hf, name).__module__ == module


def test_the_version_is_the_installed_one():
    assert mar_hf.__version__ == importlib.metadata.version("mar_hf")


@pytest.mark.parametrize("path", [*SOURCES, *BESIDE], ids=lambda path: str(path.relative_to(ROOT)))
def test_library_code_does_nothing_behind_the_users_back(path):
    assert banned(path.read_text(encoding="utf-8"), may_print=path.name in ("cli.py", "mar_hf_command.py")) == []


def test_the_search_for_imports_finds_them():
    assert "models.layers" in IMPORTS["models.modeling_mar"]
    assert "heads.__init__" in IMPORTS["models.configuration_backbone"]
    assert "utils" in IMPORTS["generation.orders"]


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_point_down(module):
    room = module.split(".")[0]
    above = [name for name in IMPORTS[module] if ROOMS.index(name.split(".")[0]) < ROOMS.index(room)]
    assert above == []


def test_imports_have_no_circle():
    left = {module: set(names) for module, names in IMPORTS.items()}
    while free := [module for module, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert sorted(left) == []


@pytest.mark.parametrize("path", [*SOURCES, *BESIDE], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_long(path):
    long = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            size = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if size > LONGEST_FUNCTION:
                long.append(f"{node.name}: {size}")
    assert long == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("x.cuda()", [".cuda"]),
        ("self.model.to(0).cuda(non_blocking=True)", [".cuda"]),
        ("torch.cuda.synchronize()", []),
        ("np.random.shuffle(x)", ["np.random"]),
        ("rng = numpy.random.default_rng()", ["numpy.random"]),
        ("torch.manual_seed(0)", ["torch.manual_seed"]),
        ("generator.manual_seed(0)", []),
        ("print(x)", ["print"]),
        ("'print(x)'  # print(x)", []),
        ("from torchvision import transforms", ["torchvision"]),
        ("import timm.models", ["timm.models"]),
        ("from ..timm import x", ["timm"]),
    ],
)
def test_the_search_for_banned_names_finds_them(source, found):
    assert banned(source) == found


@pytest.mark.slow
def test_importing_the_package_imports_no_extras():
    # diffusers imports scipy by itself where it is installed, so what counts is what comes on top.
    code = f"""
import sys
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import PreTrainedModel
before = set(sys.modules)
for module in ("mar_hf", "mar_hf.training", "mar_hf.evaluation"):
    __import__(module)
    print([name for name in {HEAVY} if name in sys.modules.keys() - before])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]"] * 3


def test_every_python_file_names_its_licence():
    folders = ("src", "tests", "examples", "benchmarks", "utils")
    files = [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    header = "# SPDX-License-Identifier: Apache-2.0"
    assert [str(path) for path in files if path.read_text(encoding="utf-8").split("\n")[0] != header] == []


def test_test_folders_are_no_packages():
    # tests/ stands on sys.path, and some of its folders have the names of libraries (tokenizers).
    assert list((ROOT / "tests").rglob("__init__.py")) == []

# SPDX-License-Identifier: Apache-2.0
"""The test suites that transformers keeps for models, from its source distribution; nothing of them stands here.

`MAR_HF_TRANSFORMERS_SOURCE` names the unpacked folder, which has to be of the installed version. The distribution
holds the suites, but not all that they import: that is replaced here by what is empty, or has no tests for our models.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import transformers


SOURCE = "MAR_HF_TRANSFORMERS_SOURCE"
PACKAGE = "transformers_source_tests"
# What every configuration takes, with other values than by default.
COMMON_SETTINGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["Model"],
    "id2label": {0: "heart", 1: "clock"},
    "label2id": {"heart": 0, "clock": 1},
    "problem_type": "regression",
}


class Unmarked:
    """Marks of transformers' own: ours are all registered, and these choose nothing here."""

    def __getattr__(self, name: str):
        return lambda test: test


def _module(name: str, **content: object) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def suite(name: str) -> ModuleType:
    """One of the suites; skips the test module that asks for it where there is none.

    Args:
        name: of the file in `tests/`, such as `"test_modeling_common"`.

    Returns:
        the module.
    """
    if not (folder := os.environ.get(SOURCE)):
        pytest.skip(f"{SOURCE} names no source distribution of transformers", allow_module_level=True)
    pytest.importorskip("parameterized")
    about = Path(folder, "PKG-INFO").read_text()
    assert f"\nVersion: {transformers.__version__}\n" in about, f"{SOURCE} is of another version"
    tests = Path(folder, "tests").resolve(strict=True)
    if PACKAGE not in sys.modules:
        _module(PACKAGE, __path__=[str(tests)])
        empty = {"generation": "GenerationTesterMixin", "exporters": "ExportTesterMixin"}
        for part, mixin in empty.items():
            file = "test_utils" if part == "generation" else "test_export"
            _module(f"{PACKAGE}.{part}", __path__=[])
            _module(f"{PACKAGE}.{part}.{file}", **{mixin: type(mixin, (), {})})
        _module(f"{PACKAGE}.utils", __path__=[])
        _module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=COMMON_SETTINGS)
    # It would look for the library beside the tests.
    with (
        mock.patch("transformers.utils.direct_transformers_import", lambda *_: transformers),
        mock.patch("pytest.mark", Unmarked()),
    ):
        return importlib.import_module(f"{PACKAGE}.{name}")

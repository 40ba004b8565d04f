# SPDX-License-Identifier: Apache-2.0
"""The checks of utils/check_repo.py must see what is wrong, and nothing else."""

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import TypedDict

import pytest
from typing_extensions import Unpack


def load_checks():
    spec = importlib.util.spec_from_file_location("check_repo", Path(__file__).parents[1] / "utils" / "check_repo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checks = load_checks()


def right(tokens, scale=1.0, *sizes, name="cosine", betas=(0.9, 0.95), seed=None, table=checks.ROOT, **kwargs):
    """Right in every argument.

    Args:
        tokens (`torch.Tensor` of shape `(batch, num_tokens)`): goes in; this default
            to nothing.
        scale, name (`float` or `str`): see below.

        scale (`float`, *optional*, defaults to 1): a number.
        name (`str`, *optional*, defaults to `"cosine"`): a
            string: with a colon.
        betas (`tuple`, *optional*, defaults to (0.9, 0.95)): a tuple.
        seed (`int`, *optional*, defaults to the clock's): prose, for what has no plain default.
        table (`Path`, *optional*, defaults to the root): likewise.
        sizes (`int`): need not be here.

    Returns:
        `int`: not an argument (defaults to 3).
    """


def with_args(*lines):
    return "\n".join(["What it does.", "", "Args:", *(f"    {line}" for line in lines)])


def problems_of(doc):
    def function(tokens, scale=1.0, flag=False):
        pass

    function.__doc__ = doc
    return list(checks.function_problems(function, is_method=False))


def test_what_is_right_passes():
    assert list(checks.function_problems(right, is_method=False)) == []


TOKENS = "tokens (`Tensor`): in."
SCALE = "scale (`float`, *optional*, defaults to 1.0): a factor."
FLAG = "flag (`bool`, *optional*, defaults to `False`): a switch."


@pytest.mark.parametrize(
    "doc, problem",
    [
        (None, "no docstring"),
        (with_args(TOKENS, SCALE), "argument `flag` is not documented"),
        (with_args(TOKENS, SCALE, FLAG, "gone (`int`): was here."), "`gone` is documented, but is no argument"),
        (with_args(TOKENS, SCALE.replace("1.0", "2.0"), FLAG), "default 2.0, but it is 1.0"),
        (with_args(TOKENS, SCALE.replace("1.0", "one"), FLAG), "default one, but it is 1.0"),
        (with_args(TOKENS, SCALE, FLAG.replace("False", "0")), "default 0, but it is False"),
        (with_args(TOKENS, "scale (`float`): a factor.", FLAG), "the default 1.0 of `scale` is not documented"),
        (with_args(TOKENS.replace("r`", "r`, defaults to 3"), SCALE, FLAG), "default 3, but has none"),
    ],
)
def test_what_is_wrong_is_named(doc, problem):
    (found,) = problems_of(doc)
    assert problem in found


def test_classes_are_checked_with_their_methods_and_fields():
    class Part:
        """A part.

        Args:
            size (`int`): its size.
        """

        def __init__(self, size, depth=2):
            pass

        @property
        def area(self):
            return 1

        def bare(self):
            pass

        @classmethod
        def from_other(cls, other):
            """Make one.

            Args:
                another (`Part`): renamed since.
            """

        def _private(self, anything):
            pass

    @dataclasses.dataclass
    class Output:
        tokens: int = 1

    @dataclasses.dataclass
    class Config(Output):
        """Settings.

        Args:
            width (`list[int]`, *optional*, defaults to `[1]`): a list.
        """

        width: list[int] = dataclasses.field(default_factory=lambda: [1, 2])

    assert list(checks.class_problems(Part)) == [
        ("Part", "argument `depth` is not documented"),
        ("Part.area", "no docstring"),
        ("Part.bare", "no docstring"),
        ("Part.from_other", "`another` is documented, but is no argument"),
        ("Part.from_other", "argument `other` is not documented"),
    ]
    assert list(checks.class_problems(Output)) == [("Output", "no docstring")]
    assert list(checks.class_problems(Config)) == [
        ("Config", "argument `width` is documented with the default [1], but it is [1, 2]")
    ]


class Base:
    """What others stand in for."""

    def draw(self, *, condition, noise=None):
        """Draw.

        Args:
            condition (`int`): goes in.
            noise (`int`, *optional*): likewise.
        """


Base.__module__ = Base.draw.__module__ = checks.PACKAGE


class Same(Base):
    """Says nothing of its own."""

    def draw(self, *, condition, noise=None):
        return super().draw(condition=condition, noise=noise)


class Other(Base):
    """Says nothing, though its arguments are others."""

    def draw(self, *, condition, noise=1):
        pass


class More(Base):
    """Says what is its own, but not all of it."""

    def draw(self, *, condition, top_k=1, top_p=2, **_):
        """Draw.

        Args:
            top_k (`int`, *optional*, defaults to 1): its own.
        """


class Gone(Base):
    """Says what is not there."""

    def draw(self, *, condition):
        """Draw.

        Args:
            noise (`int`): gone.
        """


@pytest.mark.parametrize(
    "cls, problems",
    [
        (Same, []),
        (Other, ["no docstring, but other arguments than the method that it overrides"]),
        (More, ["argument `top_p` is not documented"]),
        (Gone, ["`noise` is documented, but is no argument"]),
    ],
)
def test_what_the_overridden_method_says_is_not_said_again(cls, problems):
    assert [problem for _, problem in checks.class_problems(cls)] == problems


class Inputs(TypedDict, total=False):
    text: str
    mask: int


@pytest.mark.parametrize(
    "names, problems", [(("text", "mask"), []), (("text",), ["argument `mask` is not documented"])]
)
def test_typed_keywords_are_arguments(names, problems):
    def function(tokens, **inputs: Unpack[Inputs]):
        pass

    function.__doc__ = with_args(TOKENS, *(f"{name} (`int`, *optional*): in." for name in names))
    assert list(checks.function_problems(function, is_method=False)) == problems


def test_a_constructor_from_elsewhere_may_be_documented():
    class Parent:
        """Made here.

        Args:
            size (`int`): its size.
        """

        def __init__(self, size):
            pass

    class Child(Parent):
        """Made there.

        Args:
            size (`int`): its size.
        """

    problem = ("Child", "`size` is documented, but is no argument")
    assert list(checks.class_problems(Child)) == [problem]
    Parent.__init__.__module__ = checks.PACKAGE
    assert list(checks.class_problems(Child)) == []


def test_a_hidden_function_is_found_under_its_decorator():
    def hide(method):
        return lambda *args, **kwargs: method(*args, **kwargs)

    assert checks.own_function(hide(right), "right") is right


def test_only_what_the_package_defines_is_checked():
    def ours():
        pass

    ours.__module__ = "mar_hf.models"
    module = SimpleNamespace(__all__=["ours", "theirs", "TABLE"], ours=ours, theirs=lambda: None, TABLE={})
    assert list(checks.docstring_problems(module)) == ["mar_hf.ours: no docstring"]


def test_missing_test_files_and_undocumented_names(tmp_path):
    for path in (
        "src/mar_hf/__init__.py",
        "src/mar_hf/heads/head_a.py",
        "src/mar_hf/b.py",
        "tests/heads/test_head_a.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "docs" / "api").mkdir(parents=True)
    (tmp_path / "docs" / "api" / "models.md").write_text("See `MARModel`.")
    assert list(checks.missing_tests(tmp_path)) == ["src/mar_hf/b.py: no tests/test_b.py"]
    assert list(checks.missing_documentation(tmp_path, ["MARModel", "MAR"])) == [
        "mar_hf.MAR: not mentioned under docs/"
    ]

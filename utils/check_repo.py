# SPDX-License-Identifier: Apache-2.0
"""Checks that no linter makes: `python utils/check_repo.py` prints what is wrong and fails if anything is.

- Every public class, function, method and property has a docstring: its own, or, for a method that overrides another
  of the package with the same arguments, that of the other.
- Every parameter is documented under `Args:`, and none that is not there. A method may leave out what the method that
  it overrides has documented; what `**kwargs: Unpack[SomeTypedDict]` takes counts as parameters.
- A documented default ("defaults to X") is the signature's, and no default goes undocumented.
- Every module of the package has its test file, and every public name appears in the documentation.
"""

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from typing_extensions import Unpack


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mar_hf"
REQUIRED = inspect.Parameter.empty


def argument_entries(doc: str) -> dict[str, str]:
    """The `Args:` section of a docstring: argument name -> what is said of it, on one line."""
    lines = iter(inspect.cleandoc(doc).splitlines())
    entries: dict[str, list[str]] = {}
    for line in lines:
        if line.strip() == "Args:":
            break
    indent, names = None, []
    for line in lines:
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        if depth == 0 or depth < indent:
            break
        start = re.match(r"([\w*]+(?:, [\w*]+)*) ?([(:].*)", line.strip()) if depth == indent else None
        if start:
            names = [name.lstrip("*") for name in start[1].split(", ")]
            entries.update({name: [start[2]] for name in names})
        else:
            for name in names:
                entries[name].append(line.strip())
    return {name: " ".join(text) for name, text in entries.items()}


def stated_default(entry: str) -> str | None:
    """X of "(`type`, *optional*, defaults to X): ...", without its backticks; None where no default is stated."""
    depth = 0
    for end, character in enumerate(entry):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            break
    found = re.search(r"defaults to (.*)", entry[:end])
    return found[1].strip().strip("`") if found else None


def same_default(stated: str, actual: Any) -> bool:
    """Whether the stated default means the actual one. Prose is right only for defaults that are no plain value."""
    try:
        value = ast.literal_eval(stated)
    except (ValueError, SyntaxError):
        return stated == str(actual) or not isinstance(actual, bool | int | float | str | list | tuple | dict)
    return value == actual and isinstance(value, bool) == isinstance(actual, bool)


def argument_problems(doc: str, parameters: dict[str, Any], optional: set[str]) -> Iterator[str]:
    """What the `Args:` section gets wrong, given parameter name -> default (or `REQUIRED`).

    Args:
        doc (`str`): the docstring.
        parameters (`dict`): what must be documented.
        optional (`set`): names that may be documented besides, such as `kwargs`.
    """
    entries = argument_entries(doc)
    for name in sorted(entries.keys() - parameters.keys() - optional):
        yield f"`{name}` is documented, but is no argument"
    for name, default in parameters.items():
        stated = stated_default(entries[name]) if name in entries else None
        if name not in entries:
            yield f"argument `{name}` is not documented"
        elif default is REQUIRED and stated is not None:
            yield f"argument `{name}` is documented with the default {stated}, but has none"
        elif stated is None and default not in (REQUIRED, None):
            yield f"the default {default!r} of `{name}` is not documented"
        elif stated is not None and not same_default(stated, default):
            yield f"argument `{name}` is documented with the default {stated}, but it is {default!r}"


def own_function(member: Any, name: str) -> Callable | None:
    """The function behind a class member, under its decorators; None if the member is no function."""
    function = inspect.unwrap(getattr(member, "__func__", member))
    # Some decorators (diffusers' `apply_forward_hook`) hide what they wrap: it is left in their closure only.
    for cell in getattr(function, "__closure__", None) or ():
        if inspect.isfunction(cell.cell_contents) and cell.cell_contents.__name__ == name:
            return cell.cell_contents
    return function if inspect.isfunction(function) else None


def function_parameters(function: Callable, is_method: bool) -> tuple[dict[str, Any], set[str]]:
    """Parameter name -> default of all that must be documented; and the names of `*args` and `**kwargs`."""
    every = list(inspect.signature(function).parameters.values())[is_method:]
    variable = {p.name for p in every if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    parameters = {p.name: p.default for p in every if p.name not in variable}
    for parameter in every:
        if get_origin(parameter.annotation) is Unpack:
            parameters |= dict.fromkeys(get_args(parameter.annotation)[0].__annotations__)
    return parameters, variable


def class_parameters(cls: type) -> tuple[dict[str, Any], set[str]]:
    """The same of a class: of the fields that a dataclass adds to its bases, or of its own constructor. A constructor
    that comes from elsewhere in the package may be documented."""
    if not dataclasses.is_dataclass(cls):
        own, function = "__init__" in vars(cls), own_function(cls.__init__, "__init__")
        if not own and not (function and function.__module__.startswith(PACKAGE)):
            return {}, set()
        parameters, variable = function_parameters(function, is_method=True)
        return (parameters, variable) if own else ({}, variable | set(parameters))
    defaults = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default
        defaults[field.name] = REQUIRED if default is dataclasses.MISSING else default
    own = inspect.get_annotations(cls)
    return {name: default for name, default in defaults.items() if name in own}, set(defaults)


def class_problems(cls: type) -> Iterator[tuple[str, str]]:
    """(name, problem) of a class with its constructor, its public methods and its properties."""
    doc = vars(cls).get("__doc__") or ""
    if not doc or doc.startswith(f"{cls.__name__}("):  # what a dataclass writes by itself
        yield cls.__name__, "no docstring"
    else:
        yield from ((cls.__name__, problem) for problem in argument_problems(doc, *class_parameters(cls)))
    for name, member in vars(cls).items():
        function = own_function(member, name)
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(member, property) and not member.__doc__:
            yield f"{cls.__name__}.{name}", "no docstring"
        elif function and (function.__doc__ or not overrides_documented(cls, name)):
            is_method = not isinstance(member, staticmethod)
            for problem in function_problems(function, is_method, overridden(cls, name)):
                yield f"{cls.__name__}.{name}", problem


def overrides_documented(cls: type, name: str) -> bool:
    """Whether another library's base class documents the method. torch's `forward` does not count: it says nothing."""
    bases = [base for base in cls.__mro__[1:] if name in vars(base) and not base.__module__.startswith(PACKAGE)]
    return name != "forward" and any(vars(base)[name].__doc__ for base in bases)


def overridden(cls: type, name: str) -> Callable | None:
    """The documented function of a base class in the package that the class's own stands in for."""
    for base in cls.__mro__[1:]:
        if name in vars(base) and base.__module__.startswith(PACKAGE):
            function = own_function(vars(base)[name], name)
            if function and function.__doc__:
                return function
    return None


def function_problems(function: Callable, is_method: bool, base: Callable | None = None) -> Iterator[str]:
    """What is wrong with the docstring of one function, or of a method with what it overrides."""
    if not function.__doc__:
        if base is None:
            return iter(["no docstring"])
        ours, theirs = (arguments_of(one) for one in (function, base))
        return iter([] if ours == theirs else ["no docstring, but other arguments than the method that it overrides"])
    parameters, variable = function_parameters(function, is_method)
    documented = argument_entries(function.__doc__)
    known = argument_entries(base.__doc__) if base else {}
    inherited = known.keys() - documented.keys()
    return argument_problems(
        function.__doc__, {name: default for name, default in parameters.items() if name not in inherited}, variable
    )


def arguments_of(function: Callable) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def docstring_problems(module: Any) -> Iterator[str]:
    """Problems of all in `__all__` that the package defines. Tables and re-exports have no docstring of ours."""
    for name in module.__all__:
        value = getattr(module, name)
        if not getattr(value, "__module__", "").startswith(PACKAGE):
            continue
        if inspect.isclass(value):
            yield from (f"{PACKAGE}.{place}: {problem}" for place, problem in class_problems(value))
        elif inspect.isfunction(value):
            yield from (f"{PACKAGE}.{name}: {problem}" for problem in function_problems(value, is_method=False))


def missing_tests(root: Path) -> Iterator[str]:
    """Modules without a test file of the same name at the same place."""
    package = root / "src" / PACKAGE
    for module in sorted(package.rglob("*.py")):
        relative = module.relative_to(package)
        test = Path("tests", relative.parent, f"test_{relative.name}")
        if module.name != "__init__.py" and not (root / test).exists():
            yield f"{module.relative_to(root)}: no {test}"


def missing_documentation(root: Path, names: list[str]) -> Iterator[str]:
    """Public names that no page under docs/ mentions."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (root / "docs").rglob("*.md"))
    for name in names:
        if not re.search(rf"\b{re.escape(name)}\b", pages):
            yield f"{PACKAGE}.{name}: not mentioned under docs/"


def main() -> int:
    """Print every problem; return 1 if there is one."""
    import mar_hf

    public = [name for name in mar_hf.__all__ if not name.startswith("_")]
    problems = [*docstring_problems(mar_hf), *missing_tests(ROOT), *missing_documentation(ROOT, public)]
    print("\n".join(problems) or "check_repo: nothing found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

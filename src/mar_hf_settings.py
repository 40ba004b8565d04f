# SPDX-License-Identifier: Apache-2.0
"""Settings of a program: a dataclass, read from the command line and from files, and refused in a line.

It stands beside the package and needs the standard library only, because importing the package takes many seconds:
programs call `answer_early` before that. `HfArgumentParser` of transformers would do the same after seconds.
"""

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import json
import math
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar


Settings = TypeVar("Settings")

KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
WORDS_OF_BOOL = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# Of weights, as torch names them.
DTYPES = ("float32", "bfloat16", "float16")


def check_types(settings: Any) -> None:
    """Refuse a value of another type than its field's, numbers that are none, and True where a number belongs.

    Args:
        settings (`Any`): an instance of a dataclass.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    hints = typing.get_type_hints(type(settings))
    for name in (one.name for one in dataclasses.fields(settings)):
        value, kind = getattr(settings, name), hints[name]
        if isinstance(kind, types.UnionType):
            if value is None:
                continue
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0]
            fits = isinstance(value, list) and all(_is_a(entry, kind) for entry in value)
            allowed = f"a list, each entry {KINDS[kind]}"
        else:
            fits, allowed = _is_a(value, kind), KINDS[kind]
        if not fits:
            raise ValueError(f"`{name}` has to be {allowed}, got {value!r}.")


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        wide = int if kind is int else (int, float)
        fits = isinstance(value, wide) and not isinstance(value, bool)
        return fits and (isinstance(value, int) or math.isfinite(value))
    return isinstance(value, kind)


def check_counts(settings: Any, **least: int) -> None:
    """Refuse numbers that are too small.

    Args:
        settings (`Any`): an object with the attributes named; one that is None is fine.
        least (`int`): the smallest value of each attribute.

    Raises:
        ValueError: if one is smaller, or not a whole number.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < bound):
            raise ValueError(f"`{name}` has to be at least {bound}, got {value!r}.")


def check_choices(settings: Any, **allowed: Collection) -> None:
    """Refuse values that are not among those allowed.

    Args:
        settings (`Any`): an object with the attributes named; one that is None is fine.
        allowed (`Collection`): the values of each attribute.

    Raises:
        ValueError: if one has another value.
    """
    for name, values in allowed.items():
        value = getattr(settings, name)
        if value is not None and value not in values:
            raise ValueError(f"`{name}` has to be one of {list(values)}, got {value!r}.")


def check_paths(settings: Any, *names: str) -> None:
    """Refuse paths where there is nothing.

    Args:
        settings (`Any`): an object with the attributes named; one that is None is fine.
        names (`str`): the attributes.

    Raises:
        ValueError: naming the first that does not exist.
    """
    for name in names:
        path = getattr(settings, name)
        if path is not None and not pathlib.Path(path).exists():
            raise ValueError(f"`{name}` {path!r} does not exist.")


class Parser(argparse.ArgumentParser):
    """A command line whose faults are errors like others."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Args:
            message (`str`): what is wrong with it.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message} (see --help)")


def parse_arguments(cls: type[Settings], argv: Sequence[str] | None = None) -> Settings:
    """Settings from a file and the command line, which has the last word.

    Args:
        cls (`type`): a dataclass of settings. Each field is an option; its metadata are arguments of `add_argument`.
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own. `--config FILE`
            names a JSON or YAML file of settings; objects in it are handed on as JSON.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: if the file can't be read as settings or holds unknown ones, or an option is missing, unknown or
            of another type.
    """
    source = Parser(prog=_program(), add_help=False, allow_abbrev=False)
    source.add_argument("--config", metavar="FILE", help="JSON or YAML file; the command line overrides it")
    path, words = source.parse_known_args(sys.argv[1:] if argv is None else argv)
    names = {field.name for field in dataclasses.fields(cls)}
    if path.config is not None:
        words = [*_words_of_file(path.config, names), *words]
    parser = Parser(prog=_program(), parents=[source], allow_abbrev=False)
    for field in dataclasses.fields(cls):
        _add_option(parser, field, typing.get_type_hints(cls)[field.name])
    found, unknown = parser.parse_known_args(words)
    if unknown:
        close = [f"did you mean --{name}?" for name in difflib.get_close_matches(unknown[0].lstrip("-"), names, 1)]
        parser.error(" ".join([f"unknown options {unknown}", *close]))
    return cls(**{name: getattr(found, name) for name in names})


def _add_option(parser: Parser, field: dataclasses.Field, kind: Any) -> None:
    options = dict(field.metadata)
    if isinstance(kind, types.UnionType):  # a type or None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is list:
        kind, options["nargs"] = typing.get_args(kind)[0], "+"
    if kind is bool:
        options |= {"nargs": "?", "const": True, "metavar": "true or false"}
    if field.default_factory is not dataclasses.MISSING:
        options["default"] = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        options["default"] = field.default
    else:
        options["required"] = True
    if options.get("default") not in (None, []):
        options["help"] = f"{options.get('help', '')} (default: %(default)s)"
    flags = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
    parser.add_argument(*flags, type=_to_bool if kind is bool else kind, **options)


def _to_bool(word: str) -> bool:
    if word.lower() not in WORDS_OF_BOOL:
        raise argparse.ArgumentTypeError(f"has to be true or false, got {word!r}")
    return WORDS_OF_BOOL[word.lower()]


def _words_of_file(path: str, known: set[str]) -> list[str]:
    try:
        # Every JSON file is a YAML file, but for numbers as 1e-4, which YAML 1.1 takes for strings.
        text = pathlib.Path(path).read_text(encoding="utf-8")
        settings = json.loads(text) if path.endswith(".json") else _load_yaml(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`config` {path!r} can't be read: {error}") from error
    if not isinstance(settings, dict) or not settings.keys() <= known:
        wrong = sorted(settings.keys() - known) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"`config` {path!r} holds unknown settings {wrong}; known are {sorted(known)}.")
    words = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    return words


def _load_yaml(text: str) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise ImportError(f'`yaml` is needed here: pip install "mar_hf[train]" ({error})') from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _program() -> str:
    """The name of the program: its file, or the module that `python -m` runs."""
    name = pathlib.Path(sys.argv[0]).name
    return "mar_hf.training" if name in ("__main__.py", "-m") else name


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """End the program with one line and exit code 2 where settings or data are refused, which needs no traceback.

    In Python's development mode (`python -X dev`) there is one.

    Yields:
        None.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if sys.flags.dev_mode:
            raise
        sys.stderr.write(f"{_program()}: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error


def run_program(
    function: Callable[[Settings], Any], arguments_class: type[Settings], argv: Sequence[str] | None = None
) -> None:
    """Do something with the settings of a command line; what is refused is told in a line.

    Args:
        function (`Callable`): takes the settings.
        arguments_class (`type`): a dataclass of settings, see `parse_arguments`.
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own.
    """
    with told_in_a_line():
        function(parse_arguments(arguments_class, argv))


def answer_early(arguments_class: type) -> None:
    """Show `--help`, or refuse a wrong command line, before the imports that the program itself needs.

    Args:
        arguments_class (`type`): a dataclass of settings, whose checks need no such import.
    """
    run_program(lambda settings: None, arguments_class)


def answer_training_early(argv: Sequence[str] | None = None) -> None:
    """The same for `python -m mar_hf.training`.

    Args:
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own.
    """
    with told_in_a_line():
        arguments = load_module("training.arguments")
        program, words = arguments.split_program(sys.argv[1:] if argv is None else argv)
        check_paths(parse_arguments(arguments.PROGRAMS[program], words), "train_data_dir")


def load_module(name: str) -> types.ModuleType:
    """A module of the package that needs nothing but the standard library, without importing the package.

    Args:
        name (`str`): of the module, below `mar_hf`.

    Returns:
        `types.ModuleType`: a second copy, which `sys.modules` does not hold.
    """
    (package,) = importlib.util.find_spec("mar_hf").submodule_search_locations
    path = pathlib.Path(package, *name.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"mar_hf.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

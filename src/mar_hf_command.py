# SPDX-License-Identifier: Apache-2.0
"""The `mar-hf` command: convert and export checkpoints, generate pictures, describe a model.

It stands beside the package, because importing that takes many seconds: here arguments are read, and whatever can be
refused without a model is refused at once. What a command then does is in `mar_hf.cli`.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mar_hf_settings import load_module


DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia")
# What numbers may be: beyond this they are slips, and more than is ever drawn.
LIMITS = {
    "num_images_per_class": (1, 1_000_000),
    "batch_size": (1, 100_000),
    "num_inference_steps": (1, 1_000_000),
    "num_diffusion_steps": (1, 1_000_000),
    "guidance_scale": (-1000.0, 1000.0),
    "temperature": (0.0, 1000.0),
}
SETTINGS = ("num_inference_steps", "num_diffusion_steps", "guidance_scale", "temperature")
DECODINGS = ("gtr",)
CONFIG_TYPES = {
    "_class_name": str,
    "model_type": str,
    "architectures": list,
    "generation_defaults": dict,
    "id2label": dict,
    "text_encoder": list,
}
MANY = 40  # names shown in a message
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


demo = load_module("demo")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where the options are listed."""
        self.exit(2, f"mar-hf: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line, with one sub-command for each thing it does."""
    parser = Parser(prog="mar-hf", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(name: str, what: str, check: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(check=check)
        return sub

    sub = command("convert", "turn an original checkpoint into a folder of this package", check_convert)
    sub.add_argument("src", metavar="SRC", help="checkpoint-last.pth, .safetensors, or a KL autoencoder's .ckpt")
    sub.add_argument("dst", metavar="DST", help="folder to write; must not hold anything yet")
    sub.add_argument("--vae", metavar="KL", help="the KL autoencoder's file: DST becomes a whole pipeline")
    sub.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or raw (default: ema)")
    sub.add_argument("--config", metavar="ORIGINAL_ARGS.json", help="arguments of the original model's constructor")
    sub.add_argument(
        "--scaling-factor",
        type=float,
        help="what unit-scales the autoencoder's latents (default: 0.2325, the released autoencoder's)",
    )

    sub = command("export", "write a saved model or pipeline back under the original's names", check_export)
    sub.add_argument("src", metavar="SRC", help="folder of a pipeline, a transformer or an image tokenizer")
    sub.add_argument("dst", metavar="DST", help="a folder for a pipeline, else a .safetensors, .pth or .ckpt file")

    what = "draw pictures of some classes or texts, as a labelled grid or as single files"
    sub = command("generate", what, check_generate)
    _add_model(sub)
    sub.add_argument(
        "--class-labels",
        nargs="+",
        metavar="CLASS",
        help="names or numbers (default: all if there are at most 40, else 8 of them)",
    )
    sub.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts, for models that take them")
    sub.add_argument(
        "--text-encoder",
        metavar="FOLDER",
        help="for texts, where the model comes without: folder or hub id (`--demo` finds its own, if installed)",
    )
    sub.add_argument(
        "--num-images-per-class", "--num-images-per-prompt", type=int, default=4, help="(default: %(default)s)"
    )
    sub.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    for name in SETTINGS:
        kind = int if name.endswith("steps") else float
        sub.add_argument(f"--{name.replace('_', '-')}", type=kind, help="(default: the model's own)")
    sub.add_argument("--decoding", choices=DECODINGS, help="order and schedules in one (default: the model's own)")
    sub.add_argument("--output", type=Path, metavar="FILE.png", help="the labelled grid (default: samples.png)")
    sub.add_argument("--output-dir", type=Path, metavar="FOLDER", help="one PNG per picture, written as it is done")
    sub.add_argument("--batch-size", type=int, default=32, help="pictures at a time (default: %(default)s)")
    sub.add_argument("--device", help="(default: cuda where there is one, else cpu)")

    _add_model(command("info", "describe a model: components, sizes, geometry, scheduler, saved defaults", check_info))
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("model", metavar="MODEL", nargs="?", help="a folder or a hub id")
    which.add_argument(
        "--demo",
        nargs="?",
        const=True,
        choices=list(demo.DEMO_CHECKPOINTS),
        help="a small model that comes with the package (default: emoji; with `--prompt`: text)",
    )


def check_convert(args: argparse.Namespace) -> None:
    """Refuse what `convert` can't do, before anything is imported."""
    for path in (args.src, args.vae, args.config):
        if path is not None and not os.path.isfile(path):
            raise ValueError(f"{path!r}: No such file")
    if args.scaling_factor is not None and not 0 < args.scaling_factor < float("inf"):
        raise ValueError(f"`--scaling-factor` is {args.scaling_factor}, it has to be finite and above 0")
    _check_place("DST", Path(args.dst))
    if os.path.lexists(args.dst) and (not os.path.isdir(args.dst) or os.listdir(args.dst)):
        raise ValueError(f"DST is {args.dst!r}, it has to be a new folder, or one that holds nothing yet")


def check_export(args: argparse.Namespace) -> None:
    """Refuse what `export` can't do, before anything is imported."""
    if not os.path.isdir(args.src):
        raise ValueError(f"SRC is {args.src!r}, where there is no folder")
    _check_place("DST", Path(args.dst))
    check_configs(Path(args.src))


def check_info(args: argparse.Namespace) -> None:
    """Refuse what `info` can't do, before anything is imported; `args.model` becomes a folder or a hub id."""
    name = args.demo
    if name is True:  # the one that takes what is asked for
        name = "emoji" if vars(args).get("prompt") is None else "text"
    if name is not None:
        args.model, args.demo = demo.demo_checkpoint(name), name
    _check_model(args.model)


def check_generate(args: argparse.Namespace) -> None:
    """Refuse what `generate` can't do, before anything is imported; the defaults of `args` are filled in."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"`--{name.replace('_', '-')}` is {value}, it has to lie in {low}..{high}")
    if args.device is not None and not re.fullmatch(rf"({'|'.join(DEVICES)})(:[0-9]{{1,4}})?", args.device):
        raise ValueError(
            f"`--device` is {args.device!r}, which cannot be used here; it has to be one of {', '.join(DEVICES)}, or "
            "such a name with a number, as cuda:1"
        )
    if args.output is None and args.output_dir is None:
        args.output = Path("samples.png")
    if args.output is not None:
        if args.output.suffix.lower() != ".png" or args.output.is_dir():
            raise ValueError(f"`--output` is {str(args.output)!r}, expected a file ending in .png")
        _check_place("`--output`", args.output)
    if args.output_dir is not None:
        _check_place("`--output-dir`", args.output_dir / "0.png")
    if args.prompt is not None and args.class_labels is not None:
        raise ValueError("`--prompt` and `--class-labels` do not go together here")
    for option, texts in (("--prompt", args.prompt), ("--class-labels", args.class_labels)):
        for text in texts or ():
            if text != text.encode(errors="replace").decode():
                raise ValueError(f"`{option}`: {text!r} is no valid Unicode text")
    if args.text_encoder is not None and args.prompt is None:
        raise ValueError("`--text-encoder` goes with `--prompt`")
    check_info(args)
    if args.text_encoder is None and args.prompt is not None and args.demo == "text":
        args.text_encoder = demo.demo_text_encoder()
    _check_subjects(args)


def _check_place(argument: str, path: Path) -> None:
    """Refuse a path that can't be written, as far as that is known without writing."""
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir():
        raise ValueError(f"{argument} is {str(path)!r}, but {str(place)!r} is a file, no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{argument} is {str(path)!r}, but nothing may be written to {str(place)!r}")


def _check_model(model: str) -> None:
    """Refuse what is no model: neither a folder with sound configurations nor on the hub."""
    folder = Path(model)
    if model and folder.is_dir():
        if not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
            raise ValueError(f"{folder}: neither model_index.json nor config.json, no folder of a model")
        check_configs(folder)
    elif model and folder.exists():
        raise ValueError(f"MODEL is {model!r}, a file; it has to be a folder or a hub id")
    elif not HUB_ID.fullmatch(model):
        raise ValueError(f"MODEL is {model!r}: there is no such folder, and it is no hub id")
    else:
        # The hub's client alone is quick to import, and what is found stays in its cache.
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(model, "model_index.json")
        except OSError as error:
            raise OSError(f"MODEL is {model!r}: there is no such folder, and the hub says: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def check_configs(folder: Path) -> None:
    """Refuse a saved model if what tells one class from another in its configurations is not of the right kind.

    Args:
        folder (`pathlib.Path`): of a pipeline or of one component.

    Raises:
        ValueError: naming the file, the entry, and what is expected.
    """
    names = ("model_index.json", "config.json", "*/config.json", "*/scheduler_config.json")
    for path in [path for name in names for path in sorted(folder.glob(name))]:
        config = _read_json(path)
        for key, kind in CONFIG_TYPES.items():
            if not isinstance(config.get(key) or kind(), kind):
                raise ValueError(f"{path}: `{key}` is {config[key]!r:.100}, expected {kind.__name__}")
        if path.name == "model_index.json" and "_class_name" not in config:
            raise ValueError(f"{path}: `_class_name` is missing, the pipeline's")
        classes = config.get("id2label") or {}
        if path.name == "model_index.json" and not all(
            re.fullmatch("[0-9]+", number) and isinstance(name, str) for number, name in classes.items()
        ):
            raise ValueError(f"{path}: `id2label` has to map numbers to names, got {classes!r:.100}")


def _check_subjects(args: argparse.Namespace) -> None:
    """Refuse classes and texts that the model does not know, as far as its files on this machine tell."""
    if not Path(args.model).is_dir():
        return
    index, config = (_read_json(Path(args.model, name)) for name in ("model_index.json", "transformer/config.json"))
    if not index or not config:
        missing = "transformer/config.json" if index else "model_index.json"
        raise ValueError(f"{args.model}: {missing} is missing, so this is no whole pipeline")
    count = config.get("num_classes")  # a default is not in the file
    if args.prompt is not None:
        if config.get("text_dim") is None:
            raise ValueError("`--prompt`: this model takes no texts, it knows classes only")
        if args.text_encoder is None and index.get("text_encoder", [None])[0] is None:
            raise ValueError("`--prompt` needs the pipeline's `text_encoder`, and it has none: give `--text-encoder`")
        return
    if count == 0:
        raise ValueError("this model knows no classes: give it a `--prompt`")
    names = (index.get("id2label") or {}).values()
    known = list(dict.fromkeys(alias for name in names for alias in (name, *name.split(", "))))
    for label in args.class_labels or ():
        if label not in known and not label.isdecimal():
            some = ", ".join(known[:MANY]) or "numbers only, this model names no classes"
            raise ValueError(f"`--class-labels`: {label!r} is unknown; known are {some}")
        if label not in known and isinstance(count, int) and int(label) >= count:
            raise ValueError(f"`--class-labels`: {label} is no class, there are 0..{count - 1}")


def _flush() -> None:
    """Write out the standard output; where that fails, nothing more is written there."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # What is left over would fail once more at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"the standard output can't be written: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `mar-hf` command.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; None takes those of the process.

    Returns:
        `int`: 0; 2 after an error, 130 after an interruption, which are told in one line on the standard error output.
            In Python's development mode (`python -X dev`) errors that nobody expected keep their traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes may hold anything
    try:
        try:
            args = build_parser().parse_args(argv)
            args.check(args)
            from mar_hf.cli import run

            run(args)
        finally:
            _flush()
    except KeyboardInterrupt:
        print("mar-hf: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        message = str(error)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        message = f"{type(error).__name__}: {error}"
    else:
        return 0
    print("mar-hf: error:", *message.split(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

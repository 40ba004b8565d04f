# SPDX-License-Identifier: Apache-2.0
"""Measure how long a causal model takes for one more token, with its cache and without.

python benchmarks/cache.py                          # AR-B, 256 tokens, both branches of guidance
python benchmarks/cache.py --model large --device cuda --dtype bfloat16 --output results.jsonl
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from measuring import DTYPES, append_record, hardware, machine, now, versions
from transformers import Cache

from mar_hf import ARConfig, ARForImageGeneration


POSITIONS = [0, 16, 64, 128, 192, 250]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="base", choices=ARConfig.presets, help="size (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="another number of transformer blocks")
    parser.add_argument("--positions", type=int, nargs="+", default=POSITIONS, help="tokens that are there already")
    parser.add_argument("--batch-size", type=int, default=2, help="rows; guidance takes two a picture (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls at each position (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a line of JSON is appended to this file")
    return parser


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time the next token after each of some numbers of tokens; the ways take turns.

    Args:
        args (`argparse.Namespace`): the command line.

    Returns:
        `dict[str, Any]`: settings and medians in milliseconds, ready for JSON.
    """
    settings = {} if args.layers is None else {"num_layers": args.layers}
    with torch.device(args.device):
        model = ARForImageGeneration(ARConfig.preset(args.model, order="random", **settings))
    model = model.to(DTYPES[args.dtype]).eval()
    total, device = model.config.num_tokens, torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(args.batch_size, total, model.config.token_dim, generator=generator).to(device)
    orders = model.draw_orders(args.batch_size, generator).to(device)

    def milliseconds(done: int, cache: Cache | None) -> float:
        start = now(device)
        model.predict(tokens, orders, [1] * (done + 1), None, cache)
        return 1000 * (now(device) - start)

    rows = []
    for done in args.positions:
        row = {"position": done}
        times: dict[str, list[float]] = {"dynamic": [], "static": [], "none": []}
        for repeat in range(args.repeats + 1):
            for kind, seconds in times.items():
                cache = None
                if kind != "none":
                    cache = model.make_cache([1] * total, static=kind == "static")
                if cache is not None and done:
                    model.predict(tokens, orders, [1] * done, None, cache)
                elapsed = milliseconds(done, cache)
                if repeat:  # the first warms up
                    seconds.append(elapsed)
        rows.append(row | {kind: median(seconds) for kind, seconds in times.items()})
    return {
        "model": args.model,
        "layers": model.config.num_layers,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "milliseconds": rows,
        "machine": machine(args.device),
        "versions": versions(transformers),
    }


def table(result: dict[str, Any]) -> str:
    """The result for the eye: a Markdown table under one line of settings."""
    row = "| {position} | {dynamic:.1f} | {static:.1f} | {none:.1f} |"
    lines = [
        f"AR {result['model']}, {result['layers']} layers, {result['batch_size']} rows, {result['dtype']}, "
        + hardware(result["machine"]),
        f"milliseconds for the next token, median of {result['repeats']}",
        "",
        "| tokens before it | dynamic cache | static cache | no cache |",
        "|---|---|---|---|",
        *(row.format(**values) for values in result["milliseconds"]),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, append the record."""
    args = build_parser().parse_args(argv)
    result = run(args)
    print(table(result))
    append_record(args.output, result)


if __name__ == "__main__":
    main()

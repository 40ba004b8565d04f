# SPDX-License-Identifier: Apache-2.0
"""How many times longer torch's own linear layers take than those of oneDNN: by shape, and in whole pictures.

    python benchmarks/layers.py                                          # layers, whatever the rule says
    python benchmarks/layers.py --rows 1 2 8 64 --shapes 1024x1024 --activation silu
    python benchmarks/layers.py --presets demo-cpu head-cpu mar-b-cpu    # pictures, by the rule

Pairs take turns. With one thread, the clock is that of the thread, which hardly minds other work on the machine.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import quantiles
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import transformers
from measuring import DTYPES, Recorder, append_record, hardware, machine, now, quiet, versions
from plans import integrate
from scenarios import DEFAULTS, SCENARIOS
from torch import nn

from generation import Side, build_sides
from mar_hf.onednn import MKL_IS_NARROW, by_onednn, cpu_maker, winning_rows


# Inputs and outputs: the demo's, its head's, MAR-B's and its head's, MAR-L's.
SHAPES = ["192x192", "192x768", "256x256", "768x768", "768x3072", "1024x1024", "1024x4096"]
ROWS = [1, 2, 4, 8, 16, 64, 128, 256, 1024, 2560]
ACTIVATIONS = {"none": nn.Identity, "silu": nn.SiLU, "gelu": nn.GELU}
# Weights take turns, as in a model: bytes of them, and how many at most.
WEIGHT_BYTES, MOST_WEIGHTS = 48e6, 24
# Shortest time between two looks at the clock.
SECONDS = 2e-3


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="INxOUT", help="of layers")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of their inputs")
    parser.add_argument("--activation", default="none", choices=ACTIVATIONS, help="after each layer (default: none)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of layers")
    presets = [name for name, scenario in SCENARIOS.items() if scenario.get("device") != "cuda"]
    parser.add_argument("--presets", nargs="+", choices=presets, metavar="NAME", help=f"instead: {', '.join(presets)}")
    parser.add_argument("--batch-size", type=int, help="pictures in a call of a preset")
    parser.add_argument("--blocks", type=int, help="of encoder and decoder each, of a preset with random weights")
    parser.add_argument("--sampled-steps", type=int, help="autoregressive steps of a preset that are measured")
    parser.add_argument("--repeats", type=int, help="pairs (default: 25 of layers, 5 of presets)")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a line of JSON is appended to this file")
    return parser


def clock(device: str | torch.device = "cpu") -> float:
    """Seconds of the only thread; of the world where there are several, which wait for one another."""
    return time.thread_time() if torch.get_num_threads() == 1 else now(device)


def in_pairs(sides: dict[str, Callable[[], float]], repeats: int) -> list[float]:
    """Ratios of what torch takes and what oneDNN takes, one a pair; each is first in every other pair.

    Args:
        sides (`dict[str, Callable[[], float]]`): `"torch"` and `"onednn"`: seconds of one turn.
        repeats (`int`): pairs.

    Returns:
        `list[float]`: above 1 where oneDNN is faster.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            seconds[name].append(sides[name]())
    return [slow / fast for slow, fast in zip(seconds["torch"], seconds["onednn"], strict=True)]


class Layer(nn.Module):
    """A linear layer and what follows it, as the blocks of the models say it.

    Args:
        in_features (`int`): numbers in a row of the input.
        out_features (`int`): numbers in a row of the output.
        activation (`torch.nn.Module`): what follows.
    """

    activated_linear = "linear"

    def __init__(self, in_features: int, out_features: int, activation: nn.Module):
        super().__init__()
        self.linear, self.activation = nn.Linear(in_features, out_features), activation

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Apply both."""
        return self.activation(self.linear(states))


@torch.no_grad()
def time_layers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Pairs of each shape and number of rows, by oneDNN even where the rule would have torch's own.

    Args:
        args (`argparse.Namespace`): the command line.

    Returns:
        `Iterator[dict[str, Any]]`: of each: what it is, which of the two the rule takes, and the pairs' ratios.
    """
    dtype = DTYPES[args.dtype]
    for shape in args.shapes:
        sizes = [int(size) for size in shape.split("x")]
        count = int(min(MOST_WEIGHTS, max(1, WEIGHT_BYTES // (sizes[0] * sizes[1] * dtype.itemsize))))
        own = [Layer(*sizes, ACTIVATIONS[args.activation]()).to(dtype) for _ in range(count)]
        with patch("mar_hf.onednn.winning_rows", lambda *_: range(1, sys.maxsize)):
            layers = {"torch": own, "onednn": [by_onednn(layer) for layer in own]}
        for rows in args.rows:
            states = torch.randn(rows, sizes[0]).to(dtype)
            for layer in layers["onednn"]:  # lays its weight out
                layer(states)
            calls = max(1, int(SECONDS * count / run(own, states, count)))
            sides = {name: partial(run, modules, states, calls) for name, modules in layers.items()}
            rule = "oneDNN" if rows in winning_rows(*sizes, dtype, MKL_IS_NARROW) else "torch"
            yield {"shape": shape, "rows": rows, "rule": rule, "ratios": in_pairs(sides, args.repeats or 25)}


def run(layers: Sequence[nn.Module], states: torch.Tensor, calls: int) -> float:
    """Seconds of so many calls of layers that take turns, all on the same input."""
    start = clock()
    for layer in islice(cycle(layers), calls):
        layer(states)
    return clock() - start


def time_presets(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Pairs of pictures of each preset: the pipeline as it is, and with oneDNN switched off.

    Args:
        args (`argparse.Namespace`): the command line.

    Returns:
        `Iterator[dict[str, Any]]`: of each: what it is, and the pairs' ratios of all but the autoencoder, which has no
            linear layers to speak of, or of the preset's part.
    """
    for name in args.presets:
        scenario = {**DEFAULTS, **SCENARIOS[name]}
        for key in ("batch_size", "sampled_steps"):
            scenario[key] = getattr(args, key) or scenario[key]
        if args.blocks is not None:
            blocks = {"num_encoder_layers": args.blocks, "num_decoder_layers": args.blocks}
            scenario["model_settings"] = scenario["model_settings"] | blocks
        side = build_sides(scenario, reference=False)["ours"]
        parts = ["head"] if scenario["part"] == "head" else ["encoder", "decoder", "head", "other"]

        def turn(enabled: bool, side: Side = side, parts: Sequence[str] = parts) -> float:
            with torch.backends.mkldnn.flags(enabled=enabled), Recorder(side.device, clock=clock) as recorder:
                side.generate(side.plan, recorder)
            seconds = integrate(side.plan, recorder)
            return sum(seconds[part][0] for part in parts)

        sides = {"torch": partial(turn, False), "onednn": partial(turn, True)}
        in_pairs(sides, 1)  # warms up
        yield {"preset": name, "batch": scenario["batch_size"], "ratios": in_pairs(sides, args.repeats or 5)}


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results for the eye: a Markdown table of medians with quartiles."""
    names = [name for name in results[0] if name != "ratios"]
    lines = [f"| {' | '.join(names)} | pairs | torch / oneDNN | quartiles |", "|---" * (len(names) + 3) + "|"]
    for result in results:
        ratios = result["ratios"]
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
        cells = [str(result[name]) for name in names]
        lines.append(f"| {' | '.join(cells)} | {len(ratios)} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, append the record."""
    args = build_parser().parse_args(argv)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with quiet():
        results = list(time_presets(args) if args.presets else time_layers(args))
    described = machine("cpu") | {"maker": cpu_maker(), "vectors": torch.backends.cpu.get_cpu_capability()}
    what = "pictures without their autoencoder" if args.presets else f"{args.dtype}, activation {args.activation}"
    print(
        f"{what}, {hardware(described)}, {described['maker']}, {described['vectors']}, load {described.get('load')}\n"
    )
    print(table(results))
    append_record(
        args.output, {"results": results, "machine": described, "versions": versions(diffusers, transformers)}
    )


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What `generation.py` measured, for the eye: tables and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import PARTS, hardware
from plain_reference import TOLERANCE


# Rows that are sums of parts.
WHOLES = {"tokens": [part for part in PARTS if part != "vae"], "total": PARTS}


def table(result: dict[str, Any]) -> str:
    """The result for the eye: a Markdown table between lines that say what it is."""
    sides, batch_size = result["sides"], result["batch_size"]
    lines = [
        f"{result['scenario']}: {result['model']}, batch {batch_size}, {hardware(result['machine'])}, "
        f"load {result['machine'].get('load')}",
        *(f"{name}: {_describe(side)}" for name, side in sides.items()),
        _mode(result),
        "",
        "| seconds per picture | "
        + " | ".join(sides)
        + (" | ratio" if len(sides) > 1 else "")
        + " | "
        # Operations, and the rate at which they were done over that of a matrix product.
        + " | ".join(f"{name} TFLOP | {name} of matmul" for name in sides)
        + " |",
        "|---" * (3 * len(sides) + len(sides)) + "|",
    ]
    for part in (*PARTS, "tokens", "total"):
        seconds = {name: side["seconds_per_image"][part] for name, side in sides.items()}
        cells = [f"{value:.3f}" for value in seconds.values()]
        if len(sides) > 1:
            cells.append(f"{seconds['plain'] / seconds['ours']:.2f}" if seconds["ours"] > 0 else "")
        for name, side in sides.items():
            counted = side["operations_per_image"]
            done = sum(counted[one] for one in WHOLES.get(part, [part]))
            share = done / seconds[name] / result["matmul"][side["dtype"]] if seconds[name] > 0 else 0.0
            cells += [f"{done / 1e12:.3f}", f"{share:.0%}"] if done else ["", ""]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    rates = (f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in result["matmul"].items())
    lines += ["", f"matmul of {result['matmul_size']}: " + ", ".join(rates)]
    for name, side in sides.items():
        calls, memory = side["seconds_per_call"], side["memory_mb"]
        kind = "calls" if side["whole_calls"] else "estimates"
        held = "" if memory is None else f"; memory above what was held before {memory:,.0f} MB"
        first = "" if side["warm_up"] is None else f", after a first that took {side['warm_up']:.1f} s longer"
        lines.append(f"{name}: {len(calls)} {kind} of {min(calls):.3f} to {max(calls):.3f} s{first}{held}")
        if side["kernels_per_head_step"] is not None:
            kind = "kernels" if "gpu" in result["machine"] else "operators"
            lines[-1] += f"; {side['kernels_per_head_step']:.0f} {kind} a head step"
    if result["recompilations"] is not None:
        lines.append(f"compiled graphs made after the warm-up: {result['recompilations']}")
    if result["difference"] is not None:
        lines.append(_difference(result["difference"]))
    if "ratio" in result:
        ratios = result["ratios"]
        lines.append(
            f"{result['part']}: plain / ours, median of {len(ratios)} pairs of {min(ratios):.2f} to {max(ratios):.2f}"
        )
    return "\n".join(lines)


def _describe(side: dict[str, Any]) -> str:
    settings = side["settings"]
    return (
        f"{settings['num_inference_steps']} x {settings['num_diffusion_steps']} steps "
        f"({settings['head_step_schedule']}), guidance {settings['guidance_scale']}, {side['scheduler']}, "
        f"{side['dtype']}"
    )


def _mode(result: dict[str, Any]) -> str:
    turns = f"{result['repeats']} of each, in turns"
    if estimated := [name for name, side in result["sides"].items() if not side["whole_calls"]]:
        return (
            f"{' and '.join(estimated)} estimated from {result['sampled_steps']} autoregressive steps, the others "
            f"interpolated (--sampled-steps 0: whole calls); {turns}"
        )
    return f"whole calls, {turns}; parts of {'one call more' if result['parts_apart'] else 'the median one'}"


def _difference(difference: dict[str, Any]) -> str:
    if "ours" not in difference:
        return "outputs differ: ours has other settings"
    text = f"largest difference over largest magnitude: {difference['ours']:.1e}"
    if "plain" in difference:
        return f"{text} from the plain reference in float32; that of its own half precision: {difference['plain']:.1e}"
    return text + (f", equal (at most {TOLERANCE:.0e})" if difference["equal"] else ", in another precision")


def summary(results: Sequence[dict[str, Any]]) -> str:
    """One row a scenario."""
    sides = list(results[0]["sides"])
    lines = ["| scenario | " + " | ".join(f"{name} s per picture" for name in sides) + " | ratio |"]
    lines.append("|---" * (len(sides) + 2) + "|")
    for result in results:
        cells = [f"{side['seconds_per_image']['total']:.3f}" for side in result["sides"].values()]
        ratio = f"{result['ratio']:.2f}" if "ratio" in result else ""
        lines.append(f"| {result['scenario']} | " + " | ".join([*cells, ratio]) + " |")
    return "\n".join(lines)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of seconds per picture, one a scenario and side, made of the parts.

    Args:
        results (`Sequence[dict[str, Any]]`): what `run` returned.
        path (`Path`): a picture's name.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [(f"{result['scenario']}\n{name}", side) for result in results for name, side in result["sides"].items()]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.5 * len(bars)), layout="constrained")
    left = [0.0] * len(bars)
    for part in PARTS:
        widths = [side["seconds_per_image"][part] for _, side in bars]
        axes.barh(range(len(bars)), widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("seconds per picture")
    figure.legend(loc="outside upper center", ncols=len(PARTS))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)

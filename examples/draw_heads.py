# SPDX-License-Identifier: Apache-2.0
"""Tables, plot and samples of the comparison of token heads.

    python examples/draw_heads.py --output_dir out/heads

Reads the folder that `compare_heads.py` writes, which runs this at its end.
"""

import pathlib
from dataclasses import dataclass, field
from typing import Any

from mar_hf_settings import answer_early, run_program


# metric: (title, factor, digits)
METRICS = {
    "fd": ("Frechet distance", 1, 1),
    "kid": ("kernel distance", 1, 2),
    "precision": ("precision", 1, 2),
    "recall": ("recall", 1, 2),
    "classifier_accuracy": ("recognised, %", 100, 1),
}
MODELS = {"masked": "masked, random order", "raster": "causal, raster order"}
SHOWN_STEPS = 25  # of the samples, or as many as the head has


@dataclass
class Arguments:
    """What to draw."""

    output_dir: str = field(metadata={"help": "the folder of `compare_heads.py`"})

    def __post_init__(self) -> None:
        if not pathlib.Path(self.output_dir, "heads.json").exists():
            raise ValueError(f"`output_dir` {self.output_dir!r} has no heads.json: run compare_heads.py first.")


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_early(Arguments)

from PIL import Image

from mar_hf.evaluation.folders import read_json, write_text
from mar_hf.evaluation.pictures import save_grid
from mar_hf.evaluation.plots import draw_curves
from mar_hf.evaluation.tables import markdown_table


def in_words(metric: str, mean: float, deviation: float | None = None) -> str:
    """Mean and deviation for a table."""
    _, factor, digits = METRICS[metric]
    spread = "" if deviation is None else f" ± {deviation * factor:.{digits}f}"
    return f"{mean * factor:.{digits}f}{spread}"


def quality_table(report: dict[str, Any]) -> str:
    """A line for each row and number of head steps that all seeds measured; the last lines are of real pictures."""
    lines = []
    for name, row in report["rows"].items():
        for point in row["points"]:
            if point["num_seeds"] < len(report["seeds"]):
                continue
            cells = {"row": f"`{name}`", "head steps": str(point["head_steps"] or "one call")}
            cells["calls a token"] = f"{point['calls_a_token']:g}"
            cells |= {title: in_words(metric, *point[metric]) for metric, (title, *_) in METRICS.items()}
            cells |= {f"ms, {kind}": f"{1000 * point[kind]:.1f}" for kind in ("alone", "batch")}
            lines.append(cells | {"head's share": f"{point['head_share']:.0%}"})
    for tokenizer, found in report["tokenizers"].items():
        for kind in ("real", "reconstructions"):
            words = {"real": "real pictures", "reconstructions": f"reconstructions, {tokenizer}"}[kind]
            if kind == "reconstructions" or tokenizer == next(iter(report["tokenizers"])):
                cells = {title: in_words(metric, found[kind][metric]) for metric, (title, *_) in METRICS.items()}
                lines.append({"row": words} | cells)
    return markdown_table(lines)


def size_table(report: dict[str, Any]) -> str:
    """A line for each row: what it is, how large, what is measured once, and its guidance scale."""
    lines = []
    for name, row in report["rows"].items():
        cells = {"row": f"`{name}`", "model": MODELS[row["backbone"]], "tokens": row["tokenizer"]}
        cells |= {"head": row["head"], "its width": str(row["model_config"]["head_config"]["hidden_size"])}
        cells |= {"its parameters": f"{row['head_parameters']:,}", "parameters": f"{row['parameters']:,}"}
        seconds = [training["seconds"] for training in row["trainings"].values()]
        cells["minutes a training"] = f"{sum(seconds) / len(seconds) / 60:.1f}"
        cells["bits a number"] = "" if row["bits"] is None else f"{row['bits'][0]:.3f}"
        lines.append(cells | {"guidance scale": f"{row['guidance_scale']:g}"})
    return markdown_table(lines)


def steps_table(report: dict[str, Any]) -> str:
    """Frechet distance by number of head steps, the mean of the seeds that measured it: a line for each row."""
    found = {
        name: {point["head_steps"] or 1: in_words("fd", point["fd"][0]) for point in row["points"]}
        for name, row in report["rows"].items()
    }
    columns = sorted(set().union(*found.values()))
    cells = {name: {str(steps): by_steps.get(steps, "") for steps in columns} for name, by_steps in found.items()}
    return markdown_table([{"head steps": f"`{name}`"} | own for name, own in cells.items()])


def draw_distances(report: dict[str, Any], path: pathlib.Path) -> None:
    """Frechet distance against milliseconds a picture in a batch: a curve for each head, named by its steps."""
    panels: dict[str, dict[str, list]] = {}
    for name, row in report["rows"].items():
        points = [(1000 * point["batch"], *point["fd"], str(point["head_steps"] or "")) for point in row["points"]]
        panels.setdefault(MODELS[row["backbone"]], {})[name.partition("_")[2]] = points
    floor = next(iter(report["tokenizers"].values()))
    levels = {"real pictures": floor["real"]["fd"], "reconstructions": floor["reconstructions"]["fd"]}
    draw_curves(panels, "milliseconds a picture, in batches", "Frechet distance", path, levels)


def draw_samples(folder: pathlib.Path, report: dict[str, Any]) -> None:
    """The first samples of each class: a line for each row, with `SHOWN_STEPS` head steps and with one."""
    images, names = [], []
    for name, row in report["rows"].items():
        measured = [point["head_steps"] or 1 for point in row["points"]]
        for steps in sorted({min(SHOWN_STEPS, max(measured)), 1}, reverse=True):
            files = sorted((folder / "samples" / f"{name}-{report['seeds'][0]}-{steps}").glob("*.png"))
            images += [Image.open(file) for file in files]
            names.append(name if len(measured) == 1 else f"{name} {steps}")
    save_grid(images, names, folder / "heads_samples.png")


def main(args: Arguments) -> None:
    """Draw what is there.

    Args:
        args (`Arguments`): of the command line.
    """
    folder = pathlib.Path(args.output_dir)
    report = read_json(folder / "heads.json")
    tables = {"sizes": size_table(report), "heads": quality_table(report), "steps": steps_table(report)}
    for name, table in tables.items():
        write_text(folder / f"{name}.md", table)
        print(f"\n{table}")
    draw_distances(report, folder / "heads_distance_time.png")
    draw_samples(folder, report)


if __name__ == "__main__":
    run_program(main, Arguments)

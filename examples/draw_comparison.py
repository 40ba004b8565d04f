# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the comparison of orders, losses and tokenizers.

    python examples/draw_comparison.py --output_dir out/comparison

Reads the folder that `compare_orders.py` writes, which runs this at its end.
"""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mar_hf_settings import answer_early, run_program


# The rows of the tables, with what is said of each.
ORDERS = {
    f"{row}_{head}": {"loss": loss, "order": order, "attention": attention, "tokens a step": tokens}
    for head, loss in (("categorical", "cross-entropy"), ("diffusion", "diffusion"))
    for row, order, attention, tokens in (
        ("raster_causal", "raster", "causal", "1"),
        ("random_causal", "random", "causal", "1"),
        ("masked_one", "random", "bidirectional", "1"),
        ("mar", "random", "bidirectional", "4 on average"),
    )
}
TOKENIZERS = {
    "mar_pixels_4": {"tokens": "pixels, 4 x 4", "loss": "diffusion"},
    "mar_pixels_2": {"tokens": "pixels, 2 x 2", "loss": "diffusion"},
    "mar_diffusion": {"tokens": "KL", "loss": "diffusion"},
    "mar_vq_continuous": {"tokens": "VQ, not quantised", "loss": "diffusion"},
    "mar_categorical": {"tokens": "VQ, quantised", "loss": "cross-entropy"},
}
TABLES = {"orders": ORDERS, "tokenizers": TOKENIZERS}
FRECHET, RECOGNISED = "fd_pixels", "classifier_accuracy"


@dataclass
class Arguments:
    """What to draw."""

    output_dir: str = field(metadata={"help": "the folder of `compare_orders.py`"})

    def __post_init__(self) -> None:
        if not pathlib.Path(self.output_dir, "comparison.json").exists():
            raise ValueError(f"`output_dir` {self.output_dir!r} has no comparison.json: run compare_orders.py first.")


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_early(Arguments)

from PIL import Image

from mar_hf.evaluation.folders import read_json, write_text
from mar_hf.evaluation.pictures import save_grid
from mar_hf.evaluation.plots import draw_bars, draw_points
from mar_hf.evaluation.tables import markdown_table


def in_words(metric: str, value: Sequence[float | None]) -> str:
    """Mean and deviation for a table."""
    factor, digits, unit = (100, 1, " %") if metric == RECOGNISED else (1, 2, "")
    mean, deviation = value[0] * factor, value[1]
    spread = "" if deviation is None else f" ± {deviation * factor:.{digits}f}"
    return f"{mean:.{digits}f}{spread}{unit}"


def markdown(comparison: dict[str, Any], table: dict[str, dict[str, str]], with_tokenizers: bool) -> str:
    """A table of the rows that are there, the last one of real pictures."""
    rows, tokenizers = comparison["rows"], comparison["tokenizers"]
    lines = []
    for name in (name for name in table if name in rows):
        row = rows[name]
        cells = dict(table[name])
        if with_tokenizers:
            tokenizer = tokenizers[row["tokenizer"]]
            cells["reconstructions"] = in_words(FRECHET, [tokenizer["metrics"][FRECHET], None])
        cells["parameters"] = f"{row['parameters']:,}"
        for metric, title in ((FRECHET, "Frechet distance"), (RECOGNISED, "recognised")):
            cells[title] = in_words(metric, row["without"][metric])
            cells[f"{title}, guided"] = in_words(metric, row["with"][metric])
        cells["scale"] = f"{row['guidance_scale']:g}"
        for kind in ("alone", "batch"):
            cells[f"s a picture, {kind}"] = f"{row['seconds_a_picture'][kind]:.3f}"
        lines.append(cells)
    real = {
        metric: in_words(metric, [tokenizers["pixels"]["metrics"][metric], None]) for metric in (FRECHET, RECOGNISED)
    }
    first = next(iter(lines[0]))
    lines.append({first: "real pictures", "Frechet distance": real[FRECHET], "recognised": real[RECOGNISED]})
    return markdown_table(lines)


def label(cells: dict[str, str]) -> str:
    """A row's name in plots."""
    short = {"cross-entropy": "CE", "bidirectional": "bidir.", "4 on average": "4"}
    return " ".join(short.get(text, text) for text in cells.values())


def draw(folder: pathlib.Path, comparison: dict[str, Any], table: dict[str, dict[str, str]], name: str) -> None:
    """Plots of a table: both metrics without and with guidance, the distance against the time, samples."""
    own = [row for row in table if row in comparison["rows"]]
    rows = {label(table[row]): comparison["rows"][row] for row in own}
    real = comparison["tokenizers"]["pixels"]["metrics"]
    titles = {FRECHET: "Frechet distance of pixels", RECOGNISED: "recognised digits"}
    kinds = {"no guidance": "without", "best guidance scale": "with"}
    panels = {
        title: {words: [row[kind][metric] for row in rows.values()] for words, kind in kinds.items()}
        for metric, title in titles.items()
    }
    starts = {titles[RECOGNISED]: max(0, min(row["without"][RECOGNISED][0] for row in rows.values()) - 0.1)}
    levels = {title: real[metric] for metric, title in titles.items()}
    draw_bars(panels, list(rows), folder / f"comparison_{name}.png", levels, starts)
    points = {row: (found["seconds_a_picture"]["batch"], *found["with"][FRECHET]) for row, found in rows.items()}
    words = ("seconds a picture, in a batch", "Frechet distance of pixels, guided")
    draw_points(points, *words, folder / f"comparison_{name}_speed.png")
    # One guided sample of each digit from every row; the last row shows real pictures.
    folders = [
        folder / "evaluations" / f"{row}-{comparison['seeds'][0]}" / f"guidance_scale={scale}" / "samples"
        for row, scale in ((row, comparison["rows"][row]["guidance_scale"]) for row in own)
    ]
    folders.append(folder / "reconstructions" / "pixels")
    images = [Image.open(min(one.glob(f"{number}/*.png"))) for one in folders for number in range(10)]
    save_grid(images, [*rows, "real"], folder / f"comparison_{name}_samples.png")


def main(args: Arguments) -> None:
    """Draw what is there.

    Args:
        args (`Arguments`): of the command line.
    """
    folder = pathlib.Path(args.output_dir)
    comparison = read_json(folder / "comparison.json")
    for name, table in TABLES.items():
        if table.keys() & comparison["rows"].keys():
            text = markdown(comparison, table, with_tokenizers=name == "tokenizers")
            write_text(folder / f"{name}.md", text)
            print(f"\n{text}")
            draw(folder, comparison, table, name)


if __name__ == "__main__":
    run_program(main, Arguments)

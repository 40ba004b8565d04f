# SPDX-License-Identifier: Apache-2.0
"""What faster settings of the sampling cost in quality: settings, pictures against the clock, the curve."""

import copy
import statistics
import time
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch

from ..pipelines import MARPipeline
from ..utils import import_extra, look_up
from .folders import read_json
from .plots import saved_figure
from .sampling import DTYPES, check_sampling, generate_batch, use_scheduler
from .tables import markdown_table


# Keys of a setting beside the arguments of the pipeline.
SCHEDULER, DTYPE = "scheduler", "dtype"
INT8 = "int8"
Job = tuple[int | str, int]


def read_table(path: str, pipeline: MARPipeline) -> dict[str, dict[str, Any]]:
    """The settings to measure, all of them checked.

    Args:
        path (`str`): of the JSON file: name -> arguments of the pipeline, `scheduler`, the name of one of diffusers,
            and `dtype` of transformer and tokenizer, or `"int8"` for torchao's weights of the transformer.
        pipeline ([`MARPipeline`]): that has to take them.

    Returns:
        `dict[str, dict]`: in the file's order.

    Raises:
        ValueError: if the file is no such table, its first setting is not that of the defaults, or the pipeline
            refuses a setting.
    """
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"`table` {path!r} can't be read: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(setting, dict) for setting in table.values()):
        raise ValueError(f"`table` {path!r} has to hold a JSON object of objects.")
    if not table or next(iter(table.values())):
        raise ValueError(f"`table` {path!r} has to begin with the setting of the defaults, an empty object.")
    for name, setting in table.items():
        try:
            check_sampling(*prepare(pipeline, setting))
        except ValueError as error:
            raise ValueError(f"`table` {path!r}, {name!r}: {error}") from error
    return table


def prepare(pipeline: MARPipeline, setting: dict[str, Any]) -> tuple[MARPipeline, dict[str, Any]]:
    """What makes the pictures of a setting.

    Args:
        pipeline ([`MARPipeline`]): stays as it is.
        setting (`dict[str, Any]`): of the table.

    Returns:
        `tuple`: a pipeline with the setting's scheduler and dtype, and the arguments of its call.

    Raises:
        ValueError: if there is no such scheduler or dtype, or no torchao for `"int8"`.
    """
    variant = copy.copy(pipeline)
    if SCHEDULER in setting:
        use_scheduler(variant, setting[SCHEDULER])
    if DTYPE in setting:
        dtype = look_up({**DTYPES, INT8: INT8}, setting[DTYPE], DTYPE)
        variant.transformer = copy.deepcopy(pipeline.transformer)
        if dtype == INT8:
            try:
                from torchao.quantization import Int8WeightOnlyConfig, quantize_
            except ImportError as error:
                raise ValueError('`dtype` "int8" needs torchao: pip install --no-deps torchao') from error
            quantize_(variant.transformer, Int8WeightOnlyConfig())
        else:
            variant.transformer.to(dtype)
            variant.vae = copy.deepcopy(pipeline.vae).to(dtype)
    return variant, {name: value for name, value in setting.items() if name not in (SCHEDULER, DTYPE)}


def make_pictures(pipeline: MARPipeline, arguments: dict[str, Any], jobs: Sequence[Job], seed: int) -> torch.Tensor:
    """Pictures of one batch, as metrics take them.

    Args:
        pipeline ([`MARPipeline`]): makes them.
        arguments (`dict[str, Any]`): of its call.
        jobs (`Sequence[tuple[int | str, int]]`): class or caption of each picture, and its number.
        seed (`int`): a picture depends on it and its job.

    Returns:
        `torch.Tensor` of shape `(len(jobs), 3, height, width)`: uint8, on the CPU.
    """
    images = generate_batch(pipeline, jobs, seed, output_type="pt", **arguments)
    return (images * 255).round().byte().cpu()


def time_pictures(
    pipeline: MARPipeline, arguments: dict[str, Any], jobs: Sequence[Job], batch_size: int, seed: int
) -> tuple[list[torch.Tensor], float, float]:
    """Pictures of a setting in a round, and how long they took.

    Args:
        pipeline ([`MARPipeline`]): makes them.
        arguments (`dict[str, Any]`): of its call.
        jobs (`Sequence[tuple[int | str, int]]`): class or caption of each picture, and its number.
        batch_size (`int`): pictures at once.
        seed (`int`): of the round.

    Returns:
        `tuple`: the pictures, the seconds for one of them in batches, and the seconds for one alone.
    """
    batches = [jobs[first : first + batch_size] for first in range(0, len(jobs), batch_size)]
    start = time.perf_counter()
    pictures = [picture for batch in batches for picture in make_pictures(pipeline, arguments, batch, seed)]
    between = time.perf_counter()
    make_pictures(pipeline, arguments, jobs[:1], seed)
    return pictures, (between - start) / len(jobs), time.perf_counter() - between


def median_seconds(pipeline: MARPipeline, jobs: Sequence[Job], calls: int = 4, **arguments: Any) -> float:
    """Seconds for a picture of a batch: the median of some calls after another one.

    Args:
        pipeline ([`MARPipeline`]): makes them.
        jobs (`Sequence[tuple[int | str, int]]`): the batch: class or caption of each picture, and its number.
        calls (`int`, *optional*, defaults to 4): with the first one, which does not count.
        arguments (`Any`): of the pipeline's call.

    Returns:
        `float`.
    """
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        generate_batch(pipeline, jobs, 0, **arguments)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / len(jobs)


def summarise(rounds: list[dict[str, Any]], table: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A point of the curve for each setting of the table.

    Args:
        rounds (`list[dict]`): what was measured: `name`, `setting`, `seed`, `seconds`, `seconds_alone`, `metrics`.
        table (`dict[str, dict]`): the settings, the defaults first; all of them in every round.

    Returns:
        `list[dict]`: medians of the times, and of the speed-ups against the defaults in the same round; means and
        deviations over the rounds of the metrics, the first of which is the `distance`.
    """
    by_name = {
        name: sorted((r for r in rounds if (r["name"], r["setting"]) == (name, setting)), key=lambda r: r["seed"])
        for name, setting in table.items()
    }
    defaults, points = next(iter(by_name.values())), []
    for name, own in by_name.items():
        point: dict[str, Any] = {"name": name, **{key: table[name].get(key) for key in (SCHEDULER, DTYPE)}}
        point["arguments"] = {key: value for key, value in table[name].items() if key not in point}
        for key in ("seconds", "seconds_alone"):
            ratios = [default[key] / result[key] for default, result in zip(defaults, own, strict=True)]
            point[key] = statistics.median(result[key] for result in own)
            point[key.replace("seconds", "speed_up")] = statistics.median(ratios)
        found = {metric: [result["metrics"][metric] for result in own] for metric in own[0]["metrics"]}
        point["metrics"] = {metric: statistics.mean(values) for metric, values in found.items()}
        first = next(iter(found.values()))
        point |= {"distance": statistics.mean(first), "deviation": statistics.stdev(first)}
        points.append(point)
    return points


def draw_table(report: dict[str, Any]) -> str:
    """The curve for the eye.

    Args:
        report (`dict`): as in `speed.json`.

    Returns:
        `str`: a Markdown table; the cost is the distance beyond the defaults', in deviations between their rounds.
    """
    points = report["points"]
    shown = ("kid", "precision", "recall", "classifier", "texts")
    others = [metric for metric in points[0]["metrics"] if metric.startswith(shown)]
    rows = []
    for point in points:
        cost = (point["distance"] - points[0]["distance"]) / points[0]["deviation"]
        cells = {"setting": point["name"]}
        for words in ("", " alone"):
            key = words.replace(" ", "_")
            cells[f"seconds{words}"] = f"{point[f'seconds{key}']:.3g}"
            cells[f"speed-up{words}"] = f"{point[f'speed_up{key}']:.2f}"
        cells[report["metric"]] = f"{point['distance']:.4g} ± {point['deviation']:.2g}"
        cells["cost"] = "" if point is points[0] else f"{cost:+.1f}"
        rows.append(cells | {metric: f"{point['metrics'][metric]:.3g}" for metric in others})
    return markdown_table(rows)


def draw_curve(report: dict[str, Any], path: str | PathLike) -> None:
    """Distance against speed-up: a line for the settings whose names differ in the last word only.

    Args:
        report (`dict`): as in `speed.json`.
        path (`str` or `os.PathLike`): of the PNG file.
    """
    points = report["points"]
    lines: dict[str, list[dict]] = {}
    for point in points[1:]:
        lines.setdefault(point["name"].rpartition(" ")[0] or point["name"], []).append(point)
    colours = import_extra("matplotlib", "eval").colormaps["tab20"]
    with saved_figure(path, (9, 5.5), bbox_inches="tight") as figure:
        axis = figure.subplots()
        distance, spread = points[0]["distance"], points[0]["deviation"]
        axis.axhspan(distance - spread, distance + spread, color="grey", alpha=0.2, label="defaults, ± deviation")
        axis.plot(1, distance, "ks")
        for number, (name, own) in enumerate(lines.items()):
            own = sorted(own, key=lambda point: point["speed_up"])
            x, y = [point["speed_up"] for point in own], [point["distance"] for point in own]
            style = {"marker": "osD^v<>PX*"[number % 10], "color": colours(2 * number % 20 + number // 10 % 2)}
            axis.plot(x, y, linewidth=1, label=name, **style)
            for point in own:
                if point["name"] != name:
                    place, text = (point["speed_up"], point["distance"]), point["name"].rpartition(" ")[2]
                    axis.annotate(text, place, (4, 4), textcoords="offset points", fontsize=7)
        axis.set(xscale="log", xlabel="speed-up", ylabel=f"{report['metric']} (lower is better)")
        ticks = [tick for tick in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if tick <= 1.2 * axis.get_xlim()[1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))

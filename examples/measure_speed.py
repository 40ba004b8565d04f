# SPDX-License-Identifier: Apache-2.0
"""What faster settings of the sampling cost in quality: a table of settings, each with its time and its distance.

    OMP_NUM_THREADS=2 python examples/measure_speed.py --reference data/emoji --output_dir out/speed

The settings take turns, round after round, each round with a seed of its own: what else the machine does meets all
alike, and the rounds of the defaults show how much chance there is in a distance. `output_dir` gets `speed.json` (the
curve that `mar_hf.generation.settings_for_budget` reads), `speed.md`, `speed.png` and `samples.png`. Started again, it
goes on; the table and the number of rounds may grow. docs/speed.md says what the settings are.

With `--captions`, a folder of `prepare_emoji.py --captions --hold-out`, a model of texts draws the captions held out.
`texts_right` is the share of pictures whose nearest real one of their role has the gender and tone asked for, as in
`evaluate_texts.py`.
"""

import copy
import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import evaluate
import matplotlib.pyplot as plt
import torch
from evaluate_texts import give_text_encoder, nearest, read_candidates, read_pixels, read_rows, shares
from generate import (
    DTYPES,
    claim_folder,
    class_folders,
    is_conditional,
    load_pipeline,
    use_scheduler,
    weights_digest,
    write_whole,
)
from machine import describe_machine
from matplotlib.ticker import NullFormatter, ScalarFormatter
from PIL import Image
from training_utils import make_accelerator, parse_arguments

from mar_hf import MARPipeline, demo_checkpoint
from mar_hf.cli import image_generator
from mar_hf.generation import look_up
from mar_hf.utils import draw_grid


TABLE = pathlib.Path(__file__).parent / "configs" / "speed.json"
# Keys of a setting beside the arguments of the pipeline.
SCHEDULER, DTYPE = "scheduler", "dtype"
INT8 = "int8"


@dataclass
class Arguments:
    """Settings of a measurement."""

    reference: str = field(metadata={"help": "real pictures: image folder, or .npz (arr_0, or mu and sigma)"})
    output_dir: str = field(metadata={"help": "where everything goes"})
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "the pipeline; default: the model inside the package"}
    )
    table: str = field(
        default=str(TABLE),
        metadata={"help": "JSON: name of each setting -> arguments of the pipeline, the first none"},
    )
    captions: str | None = field(
        default=None,
        metadata={"help": "for models of texts: folder with `train` and `test`, whose captions are drawn"},
    )
    pretrained_text_encoder: str | None = field(
        default=None, metadata={"help": "folder or hub id, where the pipeline comes without"}
    )
    num_images_per_class: int = field(default=8, metadata={"help": "pictures of each class or caption, and round"})
    num_rounds: int = field(default=5, metadata={"help": "each with a seed of its own"})
    batch_size: int = field(default=48, metadata={"help": "pictures at once"})
    seed: int = field(default=0, metadata={"help": "of the first round"})
    dtype: str = field(default="float32", metadata={"help": "of the weights", "choices": list(DTYPES)})
    features: str = field(default="lite0", metadata={"help": "of pictures", "choices": list(evaluate.FEATURES)})
    weights: str | None = field(default=None, metadata={"help": "file of the weights for the features 'inception'"})
    classifier: bool = field(default=False, metadata={"help": "also train an SVM on the real pixels and ask it"})


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
        table = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`table` {path!r} can't be read: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(setting, dict) for setting in table.values()):
        raise ValueError(f"`table` {path!r} has to hold a JSON object of objects.")
    if not table or next(iter(table.values())):
        raise ValueError(f"`table` {path!r} has to begin with the setting of the defaults, an empty object.")
    for name, setting in table.items():
        try:
            variant, arguments = prepare(pipeline, setting)
            if unknown := sorted(arguments.keys() - variant.generation_defaults.keys()):
                raise ValueError(f"unknown settings {unknown}")
            variant.check_inputs(variant.generation_defaults | arguments, None, 1, None, None, "pt", [])
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


def make_pictures(
    pipeline: MARPipeline, arguments: dict[str, Any], jobs: Sequence[tuple[int | str, int]], seed: int
) -> torch.Tensor:
    """Pictures of one batch.

    Args:
        pipeline ([`MARPipeline`]): makes them.
        arguments (`dict[str, Any]`): of its call.
        jobs (`Sequence[tuple[int | str, int]]`): class or caption of each picture, and its number.
        seed (`int`): a picture depends on it and its job.

    Returns:
        `torch.Tensor` of shape `(len(jobs), 3, height, width)`: uint8, on the CPU.
    """
    subjects = [subject for subject, _ in jobs]
    if isinstance(subjects[0], str):
        given = {"prompt": subjects}
    else:
        given = {"class_labels": subjects} if is_conditional(pipeline) else {"num_images_per_prompt": len(jobs)}
    generators = [image_generator(seed, *job) for job in jobs]
    images = pipeline(**given, **arguments, generator=generators, output_type="pt").images
    return (images * 255).round().byte().cpu()


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture as Pillow has it.

    Args:
        picture (`torch.Tensor` of shape `(3, height, width)`): uint8.

    Returns:
        `PIL.Image.Image`.
    """
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def measure(
    pipeline: MARPipeline, arguments: dict[str, Any], jobs: Sequence[tuple[int | str, int]], batch_size: int, seed: int
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
    head = [
        "setting",
        "seconds",
        "speed-up",
        "seconds alone",
        "speed-up alone",
        report["metric"],
        "cost",
        *others,
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for point in points:
        cost = (point["distance"] - points[0]["distance"]) / points[0]["deviation"]
        cells = [
            point["name"],
            *(f"{point['seconds']:.3g}", f"{point['speed_up']:.2f}"),
            *(f"{point['seconds_alone']:.3g}", f"{point['speed_up_alone']:.2f}"),
            f"{point['distance']:.4g} ± {point['deviation']:.2g}",
            "" if point is points[0] else f"{cost:+.1f}",
            *(f"{point['metrics'][metric]:.3g}" for metric in others),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curve(report: dict[str, Any], path: pathlib.Path) -> None:
    """Distance against speed-up: a line for the settings whose names differ in the last word only.

    Args:
        report (`dict`): as in `speed.json`.
        path (`pathlib.Path`): of the PNG file.
    """
    points = report["points"]
    lines: dict[str, list[dict]] = {}
    for point in points[1:]:
        lines.setdefault(point["name"].rpartition(" ")[0] or point["name"], []).append(point)
    figure, axis = plt.subplots(figsize=(9, 5.5))
    distance, spread = points[0]["distance"], points[0]["deviation"]
    axis.axhspan(distance - spread, distance + spread, color="grey", alpha=0.2, label="defaults, ± deviation")
    axis.plot(1, distance, "ks")
    for number, (name, own) in enumerate(lines.items()):
        own = sorted(own, key=lambda point: point["speed_up"])
        x, y = [point["speed_up"] for point in own], [point["distance"] for point in own]
        style = {"marker": "osD^v<>PX*"[number % 10], "color": plt.cm.tab20(2 * number % 20 + number // 10 % 2)}
        axis.plot(x, y, linewidth=1, label=name, **style)
        for point in own:
            if point["name"] != name:
                place = (point["speed_up"], point["distance"])
                axis.annotate(point["name"].rpartition(" ")[2], place, (4, 4), textcoords="offset points", fontsize=7)
    axis.set(xscale="log", xlabel="speed-up", ylabel=f"{report['metric']} (lower is better)")
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    ticks = [tick for tick in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if tick <= 1.2 * axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(args: Arguments) -> None:
    """Measure what is missing, and write curve, table and pictures.

    Args:
        args (`Arguments`): of the command line.

    Raises:
        ValueError: if an argument is out of range, or the folder holds another measurement.
    """
    for name, least in (("num_images_per_class", 1), ("num_rounds", 2), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"`{name}` has to be at least {least}, got {getattr(args, name)}.")
    accelerator = make_accelerator()
    device = accelerator.device
    pipeline = load_pipeline(args.pretrained_model_name_or_path or str(demo_checkpoint()), accelerator, args.dtype)
    config = pipeline.transformer.config
    size = min(config.grid_height, config.grid_width) * pipeline.vae.stride
    classes, rows, candidates = {}, [], {}
    if args.captions is None:
        classes = class_folders(pipeline)
    elif config.text_dim is None:
        raise ValueError(f"`captions` {args.captions!r} are for models of texts; this one knows classes.")
    else:
        give_text_encoder(pipeline, args.pretrained_text_encoder)
        rows, others = (read_rows(pathlib.Path(args.captions) / split) for split in ("test", "train"))
        if not rows:
            raise ValueError(f"`captions` {args.captions!r} has no role, gender and tone in 'test'.")
        candidates = read_candidates([*rows, *others], size)
    table = read_table(args.table, pipeline)
    variants = {name: prepare(pipeline, setting) for name, setting in table.items()}
    wanted = {"reference": args.reference, "output_dir": args.output_dir, "batch_size": args.batch_size}
    wanted |= {name: getattr(args, name) for name in ("features", "weights", "classifier")}
    judge = evaluate.Judge(evaluate.Arguments(**wanted), size, list(classes.values()), device)
    subjects = list(classes) or [row["text"][0] for row in rows]
    jobs = [(subject, number) for subject in subjects for number in range(args.num_images_per_class)]
    asked = [row for row in rows for _ in range(args.num_images_per_class)]
    if len(jobs) < 4:
        raise ValueError(
            f"`num_images_per_class` {args.num_images_per_class} makes {len(jobs)} pictures, fewer than 4."
        )

    note = {key: value for key, value in asdict(args).items() if key not in ("output_dir", "table", "num_rounds")}
    note |= {"weights_digest": weights_digest(pipeline), "machine": describe_machine(device)}
    output = pathlib.Path(args.output_dir)
    claim_folder(output, note, accelerator)
    file = output / "rounds.json"
    rounds = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    warm = False
    for number in range(args.num_rounds):
        # Each round begins with another setting: which one comes after which is no part of its time.
        names = list(table)[number % len(table) :] + list(table)[: number % len(table)]
        for name in names:
            key = {"name": name, "setting": table[name], "seed": args.seed + number}
            if any(key.items() <= result.items() for result in rounds):
                continue
            if not warm:
                warm = bool(len(make_pictures(pipeline, {}, jobs[: args.batch_size], args.seed)))
            pictures, seconds, alone = measure(*variants[name], jobs, args.batch_size, args.seed + number)
            features = judge.features_of(pictures)
            metrics = judge.compare(judge.features, judge.statistics, features)
            if args.classifier:
                labels = [classes[label] for label, _ in jobs]
                metrics["classifier_accuracy"] = judge.classifier.accuracy(features["pixels"], labels)
            if asked:
                points = read_pixels([to_image(picture) for picture in pictures], size)
                metrics["texts_right"] = shares(nearest(points, asked, candidates), asked)["both"]
            rounds.append(key | {"seconds": seconds, "seconds_alone": alone, "metrics": metrics})
            write_whole(file, json.dumps(rounds, indent=1).encode())
            first, value = next(iter(metrics.items()))
            print(f"round {number}, {name}: {seconds:.3g} s, alone {alone:.3g} s, {first} {value:.4g}", flush=True)

    seeds = range(args.seed, args.seed + args.num_rounds)
    points = summarise([result for result in rounds if result["seed"] in seeds], table)
    report = {
        "metric": next(iter(points[0]["metrics"])),
        "spread": points[0]["deviation"],
        "num_images": len(jobs),
        "num_rounds": args.num_rounds,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "weights_digest": note["weights_digest"],
        "machine": note["machine"],
        "versions": {name: version(name) for name in ("mar_hf", "torch", "transformers", "diffusers")},
        "reference": {"num_images": judge.pictures and len(judge.pictures), "metrics": judge.metrics},
        "points": points,
    }
    write_whole(output / "speed.json", (json.dumps(report, indent=2) + "\n").encode())
    write_whole(output / "speed.md", draw_table(report).encode())
    draw_curve(report, output / "speed.png")
    shown = [(subject, 0) for subject in subjects[:: max(1, len(subjects) // 12)][:12]]
    pictures = [make_pictures(*variant, shown, args.seed) for variant in variants.values()]
    draw_grid([to_image(one) for some in pictures for one in some], list(table)).save(output / "samples.png")
    print(draw_table(report))
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_arguments(Arguments))

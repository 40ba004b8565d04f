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

import pathlib
from dataclasses import asdict, dataclass, field
from typing import Any

from mar_hf_settings import DTYPES, answer_early, check_counts, check_paths, run_program


TABLE = pathlib.Path(__file__).parent / "configs" / "speed.json"


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
    features: str = field(default="lite0", metadata={"help": "of pictures: lite0, inception or pixels"})
    weights: str | None = field(default=None, metadata={"help": "file of the weights for the features 'inception'"})
    classifier: bool = field(default=False, metadata={"help": "also train an SVM on the real pixels and ask it"})

    def __post_init__(self) -> None:
        check_counts(self, num_images_per_class=1, num_rounds=2, batch_size=1)
        check_paths(self, "reference", "table", "captions")


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_early(Arguments)

import torch

from mar_hf import MARPipeline, demo_checkpoint
from mar_hf.evaluation import (
    Judge,
    claim_folder,
    describe_machine,
    describe_versions,
    load_pipeline,
    use_text_encoder,
    weights_digest,
)
from mar_hf.evaluation.classes import choose_labels
from mar_hf.evaluation.folders import read_json, write_json, write_text
from mar_hf.evaluation.pictures import save_grid, to_image
from mar_hf.evaluation.sampling import picture_size
from mar_hf.evaluation.speed import (
    draw_curve,
    draw_table,
    make_pictures,
    prepare,
    read_table,
    summarise,
    time_pictures,
)
from mar_hf.evaluation.texts import nearest, read_candidates, read_pixels, read_rows, shares
from mar_hf.training import make_accelerator


class Subjects:
    """What is drawn: every class, or captions held out; and what is looked for in the pictures beside distances.

    Args:
        args (`Arguments`): of the measurement.
        pipeline ([`MARPipeline`]): gets a text encoder where captions need one.

    Raises:
        ValueError: if the model does not fit the data, or there is too little of it.
    """

    def __init__(self, args: Arguments, pipeline: MARPipeline):
        self.size, self.each = picture_size(pipeline), args.num_images_per_class
        self.classes: dict[int, str] = {}
        self.rows: list[dict] = []
        if args.captions is None:
            self.classes = choose_labels(pipeline)
        elif pipeline.transformer.config.text_dim is None:
            raise ValueError(f"`captions` {args.captions!r} are for models of texts; this one knows classes.")
        else:
            use_text_encoder(pipeline, args.pretrained_text_encoder)
            self.rows, others = (read_rows(pathlib.Path(args.captions, split)) for split in ("test", "train"))
            if not self.rows:
                raise ValueError(f"`captions` {args.captions!r} has no role, gender and tone in 'test'.")
            self.candidates = read_candidates([*self.rows, *others], self.size)
        self.all = list(self.classes) or [row["text"][0] for row in self.rows]
        self.jobs = [(subject, number) for subject in self.all for number in range(self.each)]
        if len(self.jobs) < 4:
            raise ValueError(f"`num_images_per_class` {self.each} makes {len(self.jobs)} pictures, fewer than 4.")

    def measure(self, pictures: list[torch.Tensor], judge: Judge) -> dict[str, float]:
        """Metrics of one picture for each job."""
        features = judge.features_of(pictures)
        metrics = judge.compare(judge.features, judge.statistics, features)
        if judge.classifier is not None:
            labels = [self.classes[label] for label, _ in self.jobs]
            metrics["classifier_accuracy"] = judge.classifier.accuracy(features["pixels"], labels)
        if self.rows:
            asked = [row for row in self.rows for _ in range(self.each)]
            points = read_pixels([to_image(picture) for picture in pictures], self.size)
            metrics["texts_right"] = shares(nearest(points, asked, self.candidates), asked)["both"]
        return metrics


def measure_rounds(
    args: Arguments,
    file: pathlib.Path,
    table: dict[str, dict],
    variants: dict[str, Any],
    subjects: Subjects,
    judge: Judge,
) -> list[dict[str, Any]]:
    """All rounds; those that stand in the file are not measured again."""
    rounds = read_json(file) if file.exists() else []
    warm = False
    for number in range(args.num_rounds):
        seed, first = args.seed + number, number % len(table)
        # Each round begins with another setting: which one comes after which is no part of its time.
        for name in list(table)[first:] + list(table)[:first]:
            key = {"name": name, "setting": table[name], "seed": seed}
            if any(key.items() <= result.items() for result in rounds):
                continue
            if not warm:
                plain = next(iter(variants.values()))
                warm = bool(len(make_pictures(*plain, subjects.jobs[: args.batch_size], args.seed)))
            pictures, seconds, alone = time_pictures(*variants[name], subjects.jobs, args.batch_size, seed)
            metrics = subjects.measure(pictures, judge)
            rounds.append(key | {"seconds": seconds, "seconds_alone": alone, "metrics": metrics})
            write_json(file, rounds)
            metric, value = next(iter(metrics.items()))
            print(f"round {number}, {name}: {seconds:.3g} s, alone {alone:.3g} s, {metric} {value:.4g}", flush=True)
    return [result for result in rounds if args.seed <= result["seed"] < args.seed + args.num_rounds]


def main(args: Arguments) -> None:
    """Measure what is missing, and write curve, table and pictures.

    Args:
        args (`Arguments`): of the command line.

    Raises:
        ValueError: if an argument is out of range, or the folder holds another measurement.
    """
    accelerator = make_accelerator()
    device = accelerator.device
    pipeline = load_pipeline(args.pretrained_model_name_or_path or str(demo_checkpoint()), accelerator, args.dtype)
    subjects = Subjects(args, pipeline)
    table = read_table(args.table, pipeline)
    variants = {name: prepare(pipeline, setting) for name, setting in table.items()}
    settings = {name: getattr(args, name) for name in ("features", "weights", "classifier", "batch_size")}
    labels = list(subjects.classes.values())
    judge = Judge(args.reference, subjects.size, labels, **settings, device=device, progress=True)
    note = {key: value for key, value in asdict(args).items() if key not in ("output_dir", "table", "num_rounds")}
    note |= {"weights_digest": weights_digest(pipeline), "machine": describe_machine(device)}
    output = pathlib.Path(args.output_dir)
    claim_folder(output, note, accelerator)

    points = summarise(measure_rounds(args, output / "rounds.json", table, variants, subjects, judge), table)
    report = {
        "metric": next(iter(points[0]["metrics"])),
        "spread": points[0]["deviation"],
        "num_images": len(subjects.jobs),
        **{name: getattr(args, name) for name in ("num_rounds", "batch_size", "dtype")},
        **{name: note[name] for name in ("weights_digest", "machine")},
        "versions": describe_versions(),
        "reference": {"num_images": judge.pictures and len(judge.pictures), "metrics": judge.metrics},
        "points": points,
    }
    write_json(output / "speed.json", report)
    write_text(output / "speed.md", draw_table(report))
    draw_curve(report, output / "speed.png")
    shown = [(subject, 0) for subject in subjects.all[:: max(1, len(subjects.all) // 12)][:12]]
    pictures = [make_pictures(*variant, shown, args.seed) for variant in variants.values()]
    save_grid([to_image(one) for some in pictures for one in some], list(table), output / "samples.png")
    print(draw_table(report))
    accelerator.end_training()


if __name__ == "__main__":
    run_program(main, Arguments)

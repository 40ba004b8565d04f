# SPDX-License-Identifier: Apache-2.0
"""How good a model's pictures are, also against guidance, temperature or steps.

    accelerate launch examples/evaluate.py --reference data/digits --output_dir out/evaluation \
        --pretrained_model_name_or_path out/digits/pipeline --num_images_per_class 50 --classifier \
        --sweep guidance_scale 1 2 3 4 --sweep num_inference_steps 1 4 16

`output_dir` gets `metrics.json`, which is written again after each setting; for each setting a folder with the
samples, `grid.png`, and `neighbours.png`: samples beside the real pictures nearest to them; and a plot for each sweep.
Started again, it goes on; more sweeps may be added. docs/evaluation.md says what each number means.
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Image as ImageFeature
from generate import (
    DTYPES,
    SAMPLING,
    claim_folder,
    class_folders,
    generate,
    load_pipeline,
    weights_digest,
    write_whole,
)
from generate import Arguments as GenerateArguments
from image_data import ImageTransform, center_crop, load_image_dataset
from metrics import (
    FEATURES,
    Classifier,
    PixelFeatures,
    diversity,
    extract,
    frechet_distance,
    inception_score,
    kernel_distance,
    memorised,
    nearest_neighbours,
    precision_recall,
    read_statistics,
    statistics,
    write_statistics,
)
from PIL import Image
from training_utils import make_accelerator, parse_arguments

from mar_hf.utils import draw_grid


NUMBERS = {
    "num_inference_steps": int,
    "num_diffusion_steps": int,
    "guidance_scale": float,
    "guidance_refresh": int,
    "temperature": float,
}
# An interval is two values, where a sweep has one.
SWEEPS = [name for name in SAMPLING if name != "guidance_interval"]


@dataclass
class Arguments:
    """Settings of an evaluation; those of the sampling are the checkpoint's own where not given."""

    reference: str = field(metadata={"help": "real pictures: image folder, or .npz (arr_0, or mu and sigma)"})
    output_dir: str = field(metadata={"help": "where everything goes"})
    pretrained_model_name_or_path: str | None = field(default=None, metadata={"help": "the pipeline to evaluate"})
    samples_dir: str | None = field(default=None, metadata={"help": "or an image folder or .npz of its pictures"})
    num_images_per_class: int = field(default=50, metadata={"help": "pictures of each class"})
    class_labels: list[str] | None = field(default=None, metadata={"help": "names or numbers; default: all"})
    batch_size: int = field(default=32, metadata={"help": "pictures at once in each process"})
    seed: int = field(default=0, metadata={"help": "of all pictures"})
    num_inference_steps: int | None = field(default=None, metadata={"help": "autoregressive steps"})
    num_diffusion_steps: int | None = field(default=None, metadata={"help": "steps of the token head"})
    guidance_scale: float | None = field(default=None, metadata={"help": "1 means none"})
    temperature: float | None = field(default=None, metadata={"help": "of the noise that the head injects"})
    dtype: str = field(default="float32", metadata={"help": "of the weights", "choices": list(DTYPES)})
    sweep: list[str] = field(
        default_factory=list,
        metadata={"help": "an argument of the pipeline and its values; may be repeated", "action": "extend"},
    )
    features: str = field(default="lite0", metadata={"help": "of pictures", "choices": list(FEATURES)})
    weights: str | None = field(default=None, metadata={"help": "file of the weights for the features 'inception'"})
    classifier: bool = field(default=False, metadata={"help": "also train an SVM on the real pixels and ask it"})
    save_statistics: str | None = field(default=None, metadata={"help": "write the reference's mu and sigma (.npz)"})


class Pictures:
    """A set of pictures as uint8 tensors `(3, size, size)`, of an image folder or an `.npz` with `arr_0`.

    Args:
        path (`str`): the folder or file.
        size (`int`, *optional*): side in pixels; None takes that of the first picture.

    Raises:
        ValueError: if there are no pictures.
    """

    def __init__(self, path: str, size: int | None = None):
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                if "arr_0" not in arrays.files:
                    raise ValueError(f"{path!r} holds no pictures (`arr_0`), only {arrays.files}.")
                self.rows = arrays["arr_0"]
            self.labels = None
            self.size = size or min(self.rows.shape[1:3])
        else:
            self.rows = load_image_dataset(path, caption_column=None)
            feature = self.rows.features.get("label")
            self.labels = None if feature is None else [feature.names[label] for label in self.rows["label"]]
            self.size = size or min(ImageFeature().decode_example(self.rows[0]["image"]).size)
            self.rows = self.rows.with_transform(ImageTransform(self.size))
        self.indices = list(range(len(self.rows)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> torch.Tensor:
        row = self.rows[self.indices[number]]
        if isinstance(row, np.ndarray):
            return torch.from_numpy(np.array(center_crop(Image.fromarray(row), self.size))).permute(2, 0, 1)
        return ((row["pixel_values"] + 1) * 127.5).round().byte()

    def image(self, number: int) -> Image.Image:
        """One of them.

        Args:
            number (`int`): from 0 on.

        Returns:
            `PIL.Image.Image`.
        """
        return Image.fromarray(self[number].permute(1, 2, 0).numpy())

    def keep(self, labels: set[str]) -> None:
        """Leave out the pictures of other classes.

        Args:
            labels (`set[str]`): names of classes.
        """
        self.indices = [index for index in self.indices if self.labels[index] in labels]
        self.labels = [self.labels[index] for index in self.indices]


def parse_sweeps(words: Sequence[str]) -> list[tuple[str, Any]]:
    """(argument, value) of each setting.

    Args:
        words (`Sequence[str]`): an argument's name and its values, then maybe the next name.

    Returns:
        `list[tuple[str, Any]]`: in the order given, each once.

    Raises:
        ValueError: if the first word is no name, a value no number, or a name has no values.
    """
    values: dict[str, list] = {}
    for word in words:
        if word in SWEEPS:
            name = word
            values.setdefault(name, [])
            continue
        if not values:
            raise ValueError(f"`sweep` has to begin with one of {', '.join(SWEEPS)}, got {word!r}.")
        try:
            values[name].append(NUMBERS.get(name, str)(word))
        except ValueError:
            raise ValueError(f"`sweep` of {name} has the value {word!r}, no {NUMBERS[name].__name__}.") from None
    if empty := [name for name, found in values.items() if not found]:
        raise ValueError(f"`sweep` has no values for {', '.join(empty)}.")
    return list(dict.fromkeys((name, value) for name, found in values.items() for value in found))


class Judge:
    """Measures samples against a reference, whose features it computes once.

    Args:
        args (`Arguments`): of the evaluation.
        size (`int`): side of the samples in pixels; the real pictures are made as large.
        labels (`Sequence[str]`, *optional*): classes of the samples; real pictures of others are left out.
        device (`torch.device` or `str`): where features are computed.

    Raises:
        ValueError: if the reference holds too little for what is asked.
    """

    def __init__(self, args: Arguments, size: int, labels: Sequence[str] | None, device: torch.device | str):
        self.args, self.device = args, device
        self.extractor = FEATURES[args.features](args.weights)
        self.statistics = read_statistics(args.reference) if args.reference.endswith(".npz") else None
        self.pictures = self.features = self.classifier = None
        self.metrics: dict[str, float] = {}
        try:
            self.pictures = Pictures(args.reference, size)
        except ValueError:
            if self.statistics is None:
                raise
        same_classes = bool(labels and self.pictures and self.pictures.labels) and (
            set(labels) <= set(self.pictures.labels)
        )
        if same_classes:
            self.pictures.keep(set(labels))
        elif args.classifier:
            raise ValueError(f"`classifier` needs pictures of every class of the samples in {args.reference!r}.")
        if self.pictures is not None:
            self._look_at_the_real_pictures(same_classes)

    def _look_at_the_real_pictures(self, same_classes: bool) -> None:
        if len(self.pictures) < 8:
            raise ValueError(f"`reference` {self.args.reference!r} holds {len(self.pictures)} pictures, fewer than 8.")
        self.features = self.features_of(self.pictures)
        if self.args.save_statistics:
            write_statistics(self.args.save_statistics, *statistics(self.features["frechet"]))
        order = torch.randperm(len(self.pictures), generator=torch.Generator().manual_seed(0))
        halves = [{name: rows[part] for name, rows in self.features.items()} for part in order.chunk(2)]
        self.metrics = self.compare(halves[0], None, halves[1])
        if same_classes:
            self.metrics["diversity" + self.extractor.suffix] = diversity(
                self.features["kernel"], self.pictures.labels
            )
        if self.args.classifier:
            self.classifier = Classifier(self.features["pixels"], self.pictures.labels)
            self.metrics["classifier_accuracy"] = self.classifier.cross_validated_accuracy

    def features_of(self, pictures: Pictures) -> dict[str, torch.Tensor]:
        """Features of pictures, their pixels among them.

        Args:
            pictures (`Pictures`): of one size.

        Returns:
            `dict[str, torch.Tensor]`: `frechet`, `kernel`, `pixels`, and `logits` where the network has them.
        """
        features = extract(pictures, self.extractor, self.args.batch_size, self.device, progress=True)
        return features | {"pixels": extract(pictures, PixelFeatures(), self.args.batch_size)["kernel"]}

    def compare(
        self,
        real: dict[str, torch.Tensor] | None,
        real_statistics: tuple[torch.Tensor, torch.Tensor] | None,
        fake: dict[str, torch.Tensor],
    ) -> dict[str, float]:
        """What needs no labels.

        Args:
            real (`dict[str, torch.Tensor]`, *optional*): features of the real pictures, where there are any.
            real_statistics (`tuple`, *optional*): their mean and covariance, instead of those of `real`.
            fake (`dict[str, torch.Tensor]`): features of the others.

        Returns:
            `dict[str, float]`: by name of the metric.
        """
        suffix = self.extractor.suffix
        if real_statistics is None or (real is not None and len(real_statistics[0]) != fake["frechet"].shape[1]):
            real_statistics = statistics(real["frechet"])
        found = {f"fd{suffix}" if suffix else "fid": frechet_distance(*real_statistics, *statistics(fake["frechet"]))}
        if real is not None:
            found[f"kid{suffix}"] = kernel_distance(real["kernel"], fake["kernel"])
            found[f"precision{suffix}"], found[f"recall{suffix}"] = precision_recall(real["kernel"], fake["kernel"])
            found[f"memorised{suffix}"] = memorised(real["kernel"], fake["kernel"])
            found[f"memorised{PixelFeatures.suffix}"] = memorised(real["pixels"], fake["pixels"])
        if "logits" in fake:
            found[f"inception_score{suffix}"] = inception_score(fake["logits"])
        return found

    def measure(self, samples: Pictures, folder: pathlib.Path) -> dict[str, float]:
        """All metrics of samples; `grid.png` and `neighbours.png` are written on the way.

        Args:
            samples (`Pictures`): at least 4.
            folder (`pathlib.Path`): an existing one.

        Returns:
            `dict[str, float]`: by name of the metric.
        """
        if len(samples) < 4:
            raise ValueError(f"There are {len(samples)} samples, at least 4 are needed.")
        fake = self.features_of(samples)
        found = self.compare(self.features, self.statistics, fake)
        if samples.labels is not None:
            found["diversity" + self.extractor.suffix] = diversity(fake["kernel"], samples.labels)
        if self.classifier is not None:
            found["classifier_accuracy"] = self.classifier.accuracy(fake["pixels"], samples.labels)
        draw_samples(samples, folder / "grid.png")
        if self.features is not None:
            self.draw_neighbours(samples, fake, folder / "neighbours.png")
        return {name: number for name, number in found.items() if not np.isnan(number)}

    def draw_neighbours(self, samples: Pictures, fake: dict[str, torch.Tensor], path: pathlib.Path) -> None:
        """16 samples, each beside the real pictures nearest in pixels and in features, with the distances.

        They are spread evenly from the one that is nearest to its neighbour, for how far that is from the other real
        pictures, to the one that is farthest.

        Args:
            samples (`Pictures`): to show.
            fake (`dict[str, torch.Tensor]`): their features.
            path (`pathlib.Path`): of the PNG file.
        """
        spaces = {"pixels": "pixels", self.args.features: "kernel"}
        nearest = {title: nearest_neighbours(fake[name], self.features[name]) for title, name in spaces.items()}
        distances, indices = nearest["pixels"]
        order = (distances / nearest_neighbours(self.features["pixels"])[0][indices].clamp(min=1e-9)).argsort()
        chosen = order[torch.linspace(0, len(order) - 1, min(16, len(order))).long()].tolist()
        width = 1 + len(nearest)
        figure, axes = plt.subplots(-(-len(chosen) // 4), 4 * width, figsize=(4 * width, 1.25 * -(-len(chosen) // 4)))
        for axis in axes.flat:
            axis.axis("off")
        for place, number in enumerate(chosen):
            row, column = divmod(place, 4)
            shown = [(samples.image(number), "sample")]
            for title, (far, index) in nearest.items():
                shown.append((self.pictures.image(int(index[number])), f"{title} {far[number]:.3g}"))
            for offset, (image, title) in enumerate(shown):
                axes.reshape(-1, 4 * width)[row, column * width + offset].imshow(image, interpolation="nearest")
                axes.reshape(-1, 4 * width)[row, column * width + offset].set_title(title, fontsize=7, pad=2)
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)


def draw_samples(samples: Pictures, path: pathlib.Path) -> None:
    """A grid of samples: up to 8 of each of up to 20 classes.

    Args:
        samples (`Pictures`): to show.
        path (`pathlib.Path`): of the PNG file.
    """
    rows: dict[str, list[int]] = {}
    for number, label in enumerate(samples.labels or ["samples"] * len(samples)):
        rows.setdefault(label, []).append(number)
    rows = dict(list(rows.items())[:20])
    columns = min(8, *map(len, rows.values())) if len(rows) > 1 else min(8, len(samples))
    images = [samples.image(number) for numbers in rows.values() for number in numbers[:columns]]
    draw_grid(images, list(rows)).save(path)


def draw_sweep(name: str, report: dict, path: pathlib.Path) -> None:
    """Every metric against the swept argument; dashed is what real pictures give.

    Args:
        name (`str`): of the argument.
        report (`dict`): as in `metrics.json`.
        path (`pathlib.Path`): of the PNG file.
    """
    results = sorted((r for r in report["results"] if r["sweep"] == name), key=lambda result: result["value"])
    metrics = list(results[0]["metrics"])
    figure, axes = plt.subplots(-(-len(metrics) // 3), 3, figsize=(11, 2.6 * -(-len(metrics) // 3)), squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.axis("off")
    for axis, metric in zip(axes.flat, metrics):
        axis.plot([result["value"] for result in results], [r["metrics"].get(metric) for r in results], marker="o")
        if metric in report["reference"]["metrics"]:
            axis.axhline(report["reference"]["metrics"][metric], color="grey", linestyle="--")
        axis.set(title=metric, xlabel=name)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evaluate(args: Arguments, accelerator: Accelerator) -> dict:
    """Run an evaluation, or what is left of it; every process calls this.

    Args:
        args (`Arguments`): what to do.
        accelerator (`Accelerator`): its processes share the generation, the main one measures.

    Returns:
        `dict`: as in `metrics.json`; on the main process.

    Raises:
        ValueError: if the arguments contradict each other or `output_dir` holds something else.
    """
    if (args.pretrained_model_name_or_path is None) == (args.samples_dir is None):
        raise ValueError("Give either `pretrained_model_name_or_path` or `samples_dir`.")
    settings = parse_sweeps(args.sweep) or [(None, None)]
    if args.samples_dir is not None and args.sweep:
        raise ValueError(f"`sweep` makes pictures, so it needs `pretrained_model_name_or_path`, got {args.sweep}.")
    if not os.path.exists(args.reference):
        raise ValueError(f"`reference` {args.reference!r} does not exist.")
    note = {name: value for name, value in asdict(args).items() if name not in ("sweep", "output_dir")}
    pipeline = None
    if args.samples_dir is None:
        pipeline = load_pipeline(args.pretrained_model_name_or_path, accelerator, args.dtype)
        classes = list(class_folders(pipeline, args.class_labels).values())
        config = pipeline.transformer.config
        size = min(config.grid_height, config.grid_width) * pipeline.vae.stride
        note |= {"weights_digest": weights_digest(pipeline)}
    else:
        samples = Pictures(args.samples_dir)
        size, classes = samples.size, samples.labels
    output = pathlib.Path(args.output_dir)
    claim_folder(output, note, accelerator)

    file = output / "metrics.json"
    versions = {name: version(name) for name in ("mar_hf", "torch", "transformers", "diffusers", "torchmetrics")}
    report = {"settings": note, "versions": versions | {"python": sys.version.split()[0]}, "results": []}
    if file.exists() and pipeline is not None:
        report["results"] = json.loads(file.read_text(encoding="utf-8"))["results"]
    done = {(result["sweep"], result["value"]) for result in report["results"]}
    judge = None
    for name, value in settings:
        if (name, value) in done:
            accelerator.print(f"{name}={value}: measured before")
            continue
        folder = output / ("default" if name is None else f"{name}={value}")
        sampling = None
        if judge is None and accelerator.is_main_process:  # before the work: it may find fault with the reference
            judge = Judge(args, size, classes, accelerator.device)
        if pipeline is not None:
            shared = {key: getattr(args, key) for key in note if key in GenerateArguments.__dataclass_fields__}
            own = {"output_dir": str(folder / "samples")} | ({} if name is None else {name: value})
            sampling = generate(pipeline, GenerateArguments(**(shared | own)), accelerator)
        if not accelerator.is_main_process:
            continue
        folder.mkdir(exist_ok=True)
        samples = Pictures(args.samples_dir or str(folder / "samples"))
        if pipeline is not None and len(classes) == 1:
            samples.labels = classes * len(samples)  # the reader of data sets sees no classes in a single one
        report["reference"] = {"num_images": judge.pictures and len(judge.pictures), "metrics": judge.metrics}
        metrics = judge.measure(samples, folder)
        result = {"sweep": name, "value": value, "num_images": len(samples), "sampling": sampling, "metrics": metrics}
        report["results"].append(result)
        write_whole(file, json.dumps(report, indent=2).encode())
        print(folder.name)
        for metric, number in metrics.items():
            real = judge.metrics.get(metric)
            print(f"  {metric:<24}{number:>12.5g}" + ("" if real is None else f"   real pictures {real:.5g}"))
    if accelerator.is_main_process:
        report = json.loads(file.read_text(encoding="utf-8"))
        for name in {result["sweep"] for result in report["results"]} - {None}:
            draw_sweep(name, report, output / f"{name}.png")
    return report


def main(args: Arguments) -> None:
    """Evaluate.

    Args:
        args (`Arguments`): of the command line.
    """
    accelerator = make_accelerator()
    evaluate(args, accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_arguments(Arguments))

# SPDX-License-Identifier: Apache-2.0
"""How good a model's pictures are, also against guidance, temperature or steps.

    accelerate launch examples/evaluate.py --reference data/digits --output_dir out/evaluation \
        --pretrained_model_name_or_path out/digits/pipeline --num_images_per_class 50 --classifier \
        --sweep guidance_scale 1 2 3 4 --sweep num_inference_steps 1 4 16

`output_dir` gets `metrics.json`, which is written again after each setting; for each setting a folder with the
samples, `grid.png`, and `neighbours.png`: samples beside the real pictures nearest to them; and a plot for each sweep.
Started again, it goes on; more sweeps may be added. docs/evaluation.md says what each number means.
"""

import pathlib
from dataclasses import asdict, dataclass, field
from typing import Any

from mar_hf_settings import DTYPES, answer_early, check_counts, check_paths, run_program


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
    features: str = field(default="lite0", metadata={"help": "of pictures: lite0, inception or pixels"})
    weights: str | None = field(default=None, metadata={"help": "file of the weights for the features 'inception'"})
    classifier: bool = field(default=False, metadata={"help": "also train an SVM on the real pixels and ask it"})
    save_statistics: str | None = field(default=None, metadata={"help": "write the reference's mu and sigma (.npz)"})

    def __post_init__(self) -> None:
        check_counts(self, num_images_per_class=1, batch_size=1)
        if (self.pretrained_model_name_or_path is None) == (self.samples_dir is None):
            raise ValueError("Give either `pretrained_model_name_or_path` or `samples_dir`.")
        if self.sweep and self.samples_dir is not None:
            raise ValueError(f"`sweep` makes pictures, so it needs `pretrained_model_name_or_path`, got {self.sweep}.")
        check_paths(self, "reference")


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_early(Arguments)

from accelerate import Accelerator

from mar_hf import MARPipeline
from mar_hf.evaluation import (
    Judge,
    Pictures,
    claim_folder,
    describe_versions,
    generate,
    load_pipeline,
    weights_digest,
)
from mar_hf.evaluation.classes import choose_folders, choose_labels
from mar_hf.evaluation.folders import read_json, write_json
from mar_hf.evaluation.sampling import SAMPLING, check_sampling, picture_size
from mar_hf.evaluation.sweeps import draw_sweep, parse_sweeps
from mar_hf.training import make_accelerator


class Run:
    """An evaluation in its folder.

    Args:
        args (`Arguments`): what to do.
        accelerator (`Accelerator`): its processes share the generation, the main one measures.

    Raises:
        ValueError: if a setting is out of its range, or `output_dir` holds something else.
    """

    def __init__(self, args: Arguments, accelerator: Accelerator):
        self.args, self.accelerator, self.output = args, accelerator, pathlib.Path(args.output_dir)
        self.settings = {name: value for name, value in asdict(args).items() if name not in ("sweep", "output_dir")}
        self.pipeline: MARPipeline | None = None
        self.judge: Judge | None = None
        if args.samples_dir is None:
            self.pipeline = load_pipeline(args.pretrained_model_name_or_path, accelerator, args.dtype)
            labels, folders = (choose(self.pipeline, args.class_labels) for choose in (choose_labels, choose_folders))
            # Folder of the samples -> what the reference calls such pictures.
            self.labels = {folders[number]: label for number, label in labels.items()}
            self.size = picture_size(self.pipeline)
            for name, value in parse_sweeps(args.sweep):  # the last one should not fail after hours
                check_sampling(self.pipeline, {name: value})
            self.settings["weights_digest"] = weights_digest(self.pipeline)
        else:
            samples = Pictures(args.samples_dir)
            self.labels, self.size = {name: name for name in samples.labels or []}, samples.size
        claim_folder(self.output, self.settings, accelerator)
        self.file = self.output / "metrics.json"
        versions = describe_versions("torchmetrics")
        self.report: dict[str, Any] = {"settings": self.settings, "versions": versions, "results": []}
        if self.file.exists() and self.pipeline is not None:
            self.report["results"] = read_json(self.file)["results"]

    def measure(self, name: str | None, value: Any) -> None:
        """One setting, where it was not measured before; every process calls this.

        Args:
            name (`str`, *optional*): of the swept argument; None means the settings as they are.
            value (`Any`): of that argument.
        """
        if any((result["sweep"], result["value"]) == (name, value) for result in self.report["results"]):
            self.accelerator.print(f"{name}={value}: measured before")
            return
        folder = self.output / ("default" if name is None else f"{name}={value}")
        if self.judge is None and self.accelerator.is_main_process:
            self.judge = self.make_judge()  # before the work: it may find fault with the reference
        sampling = None if self.pipeline is None else self.generate(folder / "samples", name, value)
        if not self.accelerator.is_main_process:
            return
        samples = Pictures(self.args.samples_dir or folder / "samples")
        if len(self.labels) == 1:  # the reader of data sets sees no classes in a single one
            samples.labels = list(self.labels) * len(samples)
        if samples.labels is not None:
            samples.labels = [self.labels[label] for label in samples.labels]
        real = self.judge.pictures and len(self.judge.pictures)
        self.report["reference"] = {"num_images": real, "metrics": self.judge.metrics}
        result = {"sweep": name, "value": value, "num_images": len(samples), "sampling": sampling}
        result["metrics"] = self.judge.measure(samples, folder=folder)
        self.report["results"].append(result)
        write_json(self.file, self.report)
        print(folder.name)
        for metric, number in result["metrics"].items():
            real = self.judge.metrics.get(metric)
            print(f"  {metric:<24}{number:>12.5g}" + ("" if real is None else f"   real pictures {real:.5g}"))

    def make_judge(self) -> Judge:
        """What measures; it looks at the real pictures first."""
        args = self.args
        settings = {name: getattr(args, name) for name in ("features", "weights", "classifier", "batch_size")}
        device = self.accelerator.device
        judge = Judge(args.reference, self.size, list(self.labels.values()), **settings, device=device, progress=True)
        if args.save_statistics and judge.features is not None:
            judge.save_statistics(args.save_statistics)
        return judge

    def generate(self, folder: pathlib.Path, name: str | None, value: Any) -> dict:
        """The samples of a setting."""
        args = self.args
        shared = ("num_images_per_class", "class_labels", "batch_size", "seed")
        sampling = {key: getattr(args, key) for key in SAMPLING if hasattr(args, key)}
        return generate(
            self.pipeline,
            folder,
            note={"pretrained_model_name_or_path": args.pretrained_model_name_or_path},
            accelerator=self.accelerator,
            **{key: getattr(args, key) for key in shared},
            **(sampling | ({} if name is None else {name: value})),
        )


def main(args: Arguments) -> None:
    """Evaluate, or do what is left of it.

    Args:
        args (`Arguments`): of the command line.
    """
    sweeps = parse_sweeps(args.sweep)
    accelerator = make_accelerator()
    run = Run(args, accelerator)
    for name, value in sweeps or [(None, None)]:
        run.measure(name, value)
    if accelerator.is_main_process:
        report = read_json(run.file)
        for name in {result["sweep"] for result in report["results"]} - {None}:
            draw_sweep(name, report["results"], report["reference"]["metrics"], run.output / f"{name}.png")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_program(main, Arguments)

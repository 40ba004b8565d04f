# SPDX-License-Identifier: Apache-2.0
"""Many pictures of every class, by any number of processes, into an image folder.

    accelerate launch examples/generate.py --pretrained_model_name_or_path out/mar/pipeline --output_dir out/samples \
        --num_images_per_class 50

Picture k of a class depends on the seed, the class and k: the number of processes does not matter, and neither does
stopping. Started again, it makes what is missing; with other settings it refuses the folder.
"""

from dataclasses import dataclass, field

from mar_hf_settings import DTYPES, answer_early, check_counts, run_program


@dataclass
class Arguments:
    """Settings of a generation; None means the checkpoint's own."""

    pretrained_model_name_or_path: str = field(metadata={"help": "folder or hub id of a pipeline"})
    output_dir: str = field(metadata={"help": "gets a folder of PNG files for each class"})
    num_images_per_class: int = field(default=10, metadata={"help": "pictures of each class"})
    class_labels: list[str] | None = field(default=None, metadata={"help": "names or numbers; default: all"})
    batch_size: int = field(default=32, metadata={"help": "pictures at once in each process"})
    seed: int = field(default=0, metadata={"help": "of all pictures"})
    num_inference_steps: int | None = field(default=None, metadata={"help": "autoregressive steps"})
    num_diffusion_steps: int | None = field(default=None, metadata={"help": "steps of the token head"})
    guidance_scale: float | None = field(default=None, metadata={"help": "1 means none"})
    temperature: float | None = field(default=None, metadata={"help": "of the noise that the head injects"})
    guidance_schedule: str | None = field(default=None, metadata={"help": "linear, constant, ..."})
    token_schedule: str | None = field(default=None, metadata={"help": "cosine, constant or gtr"})
    head_step_schedule: str | None = field(default=None, metadata={"help": "constant, linear or gtr"})
    generation_order: str | None = field(default=None, metadata={"help": "random, raster, spiral, ..."})
    guidance_interval: list[float] | None = field(
        default=None, metadata={"help": "start and end, shares of the steps"}
    )
    guidance_refresh: int | None = field(default=None, metadata={"help": "guided steps for one unconditional pass"})
    decoding: str | None = field(default=None, metadata={"help": "gtr: order, schedules and detail_share of GtR"})
    detail_share: float | None = field(default=None, metadata={"help": "tokens of a step with all head steps"})
    scheduler: str | None = field(default=None, metadata={"help": "one of diffusers, such as DDIMScheduler"})
    dtype: str = field(default="float32", metadata={"help": "of the weights", "choices": list(DTYPES)})
    npz: bool = field(default=False, metadata={"help": "also write samples.npz: arr_0 (uint8, NHWC) and labels arr_1"})

    def __post_init__(self) -> None:
        check_counts(self, num_images_per_class=1, batch_size=1)


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_early(Arguments)

from mar_hf.evaluation import generate, load_pipeline, use_scheduler
from mar_hf.evaluation.sampling import SAMPLING
from mar_hf.training import make_accelerator


def main(args: Arguments) -> None:
    """Make the pictures.

    Args:
        args (`Arguments`): of the command line.
    """
    accelerator = make_accelerator()
    pipeline = load_pipeline(args.pretrained_model_name_or_path, accelerator, args.dtype)
    if args.scheduler is not None:
        use_scheduler(pipeline, args.scheduler)
    generate(
        pipeline,
        args.output_dir,
        num_images_per_class=args.num_images_per_class,
        class_labels=args.class_labels,
        batch_size=args.batch_size,
        seed=args.seed,
        npz=args.npz,
        note={"pretrained_model_name_or_path": args.pretrained_model_name_or_path},
        accelerator=accelerator,
        **{name: getattr(args, name) for name in SAMPLING},
    )
    accelerator.print(f"{args.num_images_per_class} pictures of each class in {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_program(main, Arguments)

# SPDX-License-Identifier: Apache-2.0
"""Does a model draw combinations that it never saw? Finds the real neighbours of pictures for captions held out.

    python examples/evaluate_texts.py --pretrained_model_name_or_path out/text/pipeline --data_dir data/emoji_text \\
        --output_dir out/text_evaluation

For every row of `test/metadata.jsonl` with a `role`, `gender` and `tone` (`prepare_emoji.py --captions --hold-out`),
pictures are generated from its first caption. The nearest real picture among all genders and tones of the role, by
squared distance of pixels, should be the one held out; `among_all_roles` says how often it is the nearest of all
roles' pictures. Reported for each guidance scale, beside chance, beside shuffled prompts (pictures of other rows'
captions, judged as if they were for this one) and beside the limit that the image tokenizer sets: the real pictures,
encoded and decoded. `--split train` does the same with combinations that the model saw.
"""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mar_hf_settings import answer_early, check_counts, check_paths, run_program


@dataclass
class Arguments:
    """Settings of an evaluation of texts; None means the checkpoint's own."""

    pretrained_model_name_or_path: str = field(metadata={"help": "folder or hub id of a pipeline"})
    data_dir: str = field(metadata={"help": "with `train` and `test`, each with a `metadata.jsonl`"})
    output_dir: str = field(metadata={"help": "gets metrics.json, a plot and a grid; must not hold anything yet"})
    pretrained_text_encoder: str | None = field(
        default=None, metadata={"help": "folder or hub id, where the pipeline comes without"}
    )
    split: str = field(default="test", metadata={"help": "whose captions", "choices": ["test", "train"]})
    num_prompts: int | None = field(default=None, metadata={"help": "so many captions, from all over; default: all"})
    guidance_scales: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 6.0, 8.0], metadata={"help": "each is measured"}
    )
    num_images_per_prompt: int = field(default=2, metadata={"help": "pictures of each caption"})
    num_inference_steps: int | None = field(default=None, metadata={"help": "autoregressive steps"})
    num_diffusion_steps: int | None = field(default=None, metadata={"help": "steps of the token head"})
    temperature: float | None = field(default=None, metadata={"help": "of the noise that the head injects"})
    batch_size: int = field(default=32, metadata={"help": "pictures at once"})
    seed: int = field(default=0, metadata={"help": "of all pictures"})

    def __post_init__(self) -> None:
        check_counts(self, num_prompts=1, num_images_per_prompt=1, batch_size=1)
        check_paths(self, "data_dir")
        if not self.guidance_scales:
            raise ValueError("`guidance_scales` is empty.")


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_early(Arguments)

from PIL import Image
from tqdm.auto import tqdm

from mar_hf import MARPipeline
from mar_hf.evaluation import generate_batch, load_pipeline, use_text_encoder
from mar_hf.evaluation.folders import write_json
from mar_hf.evaluation.pictures import save_grid
from mar_hf.evaluation.plots import draw_lines
from mar_hf.evaluation.texts import ATTRIBUTES, chance, judge_texts, limit, read_candidates, read_pixels, read_rows
from mar_hf.training import center_crop, make_accelerator
from mar_hf.utils import atomic_folder


SETTINGS = ("num_inference_steps", "num_diffusion_steps", "temperature")


def generate(pipe: MARPipeline, prompts: Sequence[str], scale: float, args: Arguments, bar: tqdm) -> list[Image.Image]:
    """Pictures for prompts, those of a prompt one after the other; the same seeds for every scale.

    Args:
        pipe ([`MARPipeline`]): with a text encoder.
        prompts (`Sequence[str]`): texts.
        scale (`float`): of guidance.
        args (`Arguments`): of the run.
        bar (`tqdm`): counts pictures.

    Returns:
        `list[PIL.Image.Image]`: as many for each prompt.
    """
    jobs = [(prompt, number) for prompt in prompts for number in range(args.num_images_per_prompt)]
    settings = {name: getattr(args, name) for name in SETTINGS}
    images = []
    for first in range(0, len(jobs), args.batch_size):
        batch = jobs[first : first + args.batch_size]
        images += generate_batch(pipe, batch, args.seed, guidance_scale=scale, **settings)
        bar.update(len(batch))
    return images


def read_wanted(args: Arguments) -> tuple[list[dict], list[dict]]:
    """The rows whose captions are drawn, and all rows of both splits."""
    splits = {name: read_rows(pathlib.Path(args.data_dir, name)) for name in ("test", "train")}
    wanted = splits[args.split]
    if not wanted:
        raise ValueError(f"`data_dir` {args.data_dir!r} has no role, gender and tone in {args.split!r}.")
    if args.num_prompts is not None and args.num_prompts < len(wanted):
        wanted = [wanted[len(wanted) * number // args.num_prompts] for number in range(args.num_prompts)]
    return wanted, [*splits["test"], *splits["train"]]


def draw_curve(report: dict[str, Any], path: pathlib.Path) -> None:
    """Shares of right neighbours against guidance."""
    results = report["results"]
    names = ("both", *ATTRIBUTES)
    panels = {
        name: {f"{kind} prompts": [result[kind][name] for result in results] for kind in ("right", "shuffled")}
        for name in names
    }
    levels = {
        name: {"limit of the tokenizer": report["limit"][name], "chance": report["chance"][name]} for name in names
    }
    draw_lines(panels, [r["guidance_scale"] for r in results], "guidance scale", path, levels, ylim=(0, 1.03))


def draw_samples(wanted: Sequence[dict], images: Sequence[Image.Image], size: int, path: pathlib.Path) -> None:
    """A row for each of about twelve captions: the real picture, then those that were drawn."""
    cells, each = [], len(images) // len(wanted)
    shown = range(0, len(wanted), max(1, len(wanted) // 12))
    for index in shown:
        cells.append(center_crop(Image.open(wanted[index]["path"]), size))
        cells += images[index * each : (index + 1) * each]
    save_grid(cells, [wanted[index]["text"][0] for index in shown], path)


def main(args: Arguments) -> None:
    """Generate, find neighbours, report.

    Args:
        args (`Arguments`): of the command line.
    """
    wanted, everyone = read_wanted(args)
    pipe = load_pipeline(args.pretrained_model_name_or_path, make_accelerator())
    use_text_encoder(pipe, args.pretrained_text_encoder)
    size = pipe.transformer.config.grid_height * pipe.vae.stride
    candidates = read_candidates(everyone, size)
    prompts = [row["text"][0] for row in wanted]
    results, pictures = [], {}
    with tqdm(total=len(prompts) * args.num_images_per_prompt * len(args.guidance_scales)) as bar:
        for scale in args.guidance_scales:
            pictures[scale] = generate(pipe, prompts, scale, args, bar)
            found = judge_texts(read_pixels(pictures[scale], size), wanted, candidates)
            results.append({"guidance_scale": scale, **found})
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    report = {
        **{"split": args.split, "num_prompts": len(wanted), "num_images_per_prompt": args.num_images_per_prompt},
        **{"seed": args.seed, "settings": {**pipe.generation_defaults, **given}},
        "chance": chance(wanted, candidates),
        "limit": limit(wanted, candidates, pipe.vae, size),
        "results": results,
    }
    best = max(results, key=lambda result: result["right"]["both"])["guidance_scale"]
    with atomic_folder(args.output_dir) as folder:
        write_json(folder / "metrics.json", report)
        draw_curve(report, folder / "guidance.png")
        draw_samples(wanted, pictures[best], size, folder / "samples.png")
    for result in results:
        shuffled = result["shuffled"]["both"]
        print(f"guidance {result['guidance_scale']:g}: {result['right']}, shuffled prompts {shuffled}")
    print(f"chance {report['chance']}, limit of the tokenizer {report['limit']}")


if __name__ == "__main__":
    run_program(main, Arguments)

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

import json
import pathlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from generate import load_pipeline
from image_data import center_crop
from PIL import Image
from tqdm.auto import tqdm
from training_utils import make_accelerator, parse_arguments

from mar_hf import MARPipeline
from mar_hf.cli import image_generator
from mar_hf.models import load_text_encoder
from mar_hf.utils import atomic_folder, draw_grid


ATTRIBUTES = ("gender", "tone")
SETTINGS = ("num_inference_steps", "num_diffusion_steps", "temperature")


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
        for name in ("num_prompts", "num_images_per_prompt", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` has to be at least 1, got {getattr(self, name)}.")
        if not self.guidance_scales:
            raise ValueError("`guidance_scales` is empty.")


def give_text_encoder(pipe: MARPipeline, pretrained: str | None) -> None:
    """A text encoder for a pipeline that came without.

    Args:
        pipe ([`MARPipeline`]): of a model of texts.
        pretrained (`str`, *optional*): folder or hub id; None: the pipeline has one.

    Raises:
        ValueError: if it has none.
    """
    if pretrained is not None:
        text_encoder, tokenizer = load_text_encoder(pretrained)
        pipe.register_modules(text_encoder=text_encoder.to(pipe.device), tokenizer=tokenizer)
    elif pipe.text_encoder is None:
        raise ValueError("The pipeline has no text encoder: give one with `pretrained_text_encoder`.")


def read_rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a split that have a role, with the path of their picture.

    Args:
        folder (`pathlib.Path`): of the split.

    Returns:
        `list[dict]`: as in `metadata.jsonl`, with `path`.

    Raises:
        ValueError: if there is no such file.
    """
    try:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"`data_dir` has no captions with roles: {error}") from error
    rows = [json.loads(line) for line in lines]
    return [{**row, "path": folder / row["file_name"]} for row in rows if row.get("role")]


def read_pixels(pictures: Sequence[Image.Image], size: int) -> torch.Tensor:
    """Pictures as points.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): of any size.
        size (`int`): side in pixels to compare at.

    Returns:
        `torch.Tensor` of shape `(pictures, 3 * size * size)`: in [0, 1].
    """
    return torch.stack([torch.from_numpy(np.array(center_crop(one, size))).flatten() / 255 for one in pictures])


def read_candidates(rows: Sequence[dict], size: int) -> dict[str, tuple[list[dict], torch.Tensor]]:
    """Real pictures by role.

    Args:
        rows (`Sequence[dict]`): from `read_rows`.
        size (`int`): side in pixels to compare at.

    Returns:
        `dict[str, tuple]`: of each role, the rows of all genders and tones, and their points.
    """
    by_role = defaultdict(list)
    for row in rows:
        by_role[row["role"]].append(row)
    return {role: (own, read_pixels([Image.open(row["path"]) for row in own], size)) for role, own in by_role.items()}


def nearest(
    points: torch.Tensor, wanted: Sequence[dict], candidates: dict[str, tuple[list[dict], torch.Tensor]]
) -> list:
    """The nearest real picture of the wanted role for each point.

    Args:
        points (`torch.Tensor` of shape `(n, d)`): generated pictures.
        wanted (`Sequence[dict]`): the row that each is judged by.
        candidates (`dict`): from `read_candidates`.

    Returns:
        `list[dict]`: rows.
    """
    found = []
    for point, row in zip(points, wanted, strict=True):
        rows, places = candidates[row["role"]]
        found.append(rows[int((places - point).square().sum(1).argmin())])
    return found


def shares(found: Sequence[dict], wanted: Sequence[dict]) -> dict[str, float]:
    """How often neighbours are right: in both attributes, and in each.

    Args:
        found (`Sequence[dict]`): rows of neighbours.
        wanted (`Sequence[dict]`): rows asked for.

    Returns:
        `dict[str, float]`: `both` and the attributes, in [0, 1].
    """
    right = {name: [a[name] == b[name] for a, b in zip(found, wanted, strict=True)] for name in ATTRIBUTES}
    both = [all(one) for one in zip(*right.values(), strict=True)]
    return {name: sum(values) / len(values) for name, values in {"both": both, **right}.items()}


def confusion(found: Sequence[dict], wanted: Sequence[dict], name: str) -> dict[str, dict[str, int]]:
    """How often each value was drawn for each that was asked for.

    Args:
        found (`Sequence[dict]`): rows of neighbours.
        wanted (`Sequence[dict]`): rows asked for.
        name (`str`): an attribute.

    Returns:
        `dict[str, dict[str, int]]`: asked for, then drawn.
    """
    counts = Counter((b[name], a[name]) for a, b in zip(found, wanted, strict=True))
    values = sorted({value for pair in counts for value in pair})
    return {asked: {drawn: counts[asked, drawn] for drawn in values} for asked in values}


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
        generators = [image_generator(args.seed, *job) for job in batch]
        texts = [prompt for prompt, _ in batch]
        images += pipe(prompt=texts, guidance_scale=scale, generator=generators, **settings).images
        bar.update(len(batch))
    return images


@torch.no_grad()
def reconstruct(pipe: MARPipeline, points: torch.Tensor, size: int) -> torch.Tensor:
    """What the image tokenizer makes of real pictures.

    Args:
        pipe ([`MARPipeline`]): its image tokenizer is used.
        points (`torch.Tensor` of shape `(pictures, 3 * size * size)`): see `read_pixels`.
        size (`int`): side in pixels.

    Returns:
        `torch.Tensor`: of the same shape.
    """
    pixels = points.unflatten(1, (size, size, 3)).permute(0, 3, 1, 2).to(pipe.device) * 2 - 1
    decoded = pipe.vae.decode(pipe.vae.encode(pixels, sample_posterior=False).tokens)
    return (decoded.clamp(-1, 1).permute(0, 2, 3, 1).flatten(1).cpu() + 1) / 2


def draw_curve(report: dict[str, Any], path: pathlib.Path) -> None:
    """Shares of right neighbours against guidance.

    Args:
        report (`dict`): what `main` writes.
        path (`pathlib.Path`): of the PNG file.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    scales = [result["guidance_scale"] for result in report["results"]]
    for axis, name in zip(axes, ("both", *ATTRIBUTES), strict=True):
        for kind, style in (("right", "o-"), ("shuffled", "s--")):
            axis.plot(scales, [result[kind][name] for result in report["results"]], style, label=f"{kind} prompts")
        axis.axhline(report["limit"][name], color="grey", linestyle="-.", label="limit of the tokenizer")
        axis.axhline(report["chance"][name], color="grey", linestyle=":", label="chance")
        axis.set(title=name, xlabel="guidance scale", ylim=(0, 1.03))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of nearest neighbours")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(wanted: Sequence[dict], images: Sequence[Image.Image], size: int) -> Image.Image:
    """A row for each of about twelve captions: the real picture, then those that were drawn.

    Args:
        wanted (`Sequence[dict]`): rows asked for.
        images (`Sequence[PIL.Image.Image]`): generated, as many for each row.
        size (`int`): side in pixels.

    Returns:
        `PIL.Image.Image`: a labelled grid.
    """
    cells, each = [], len(images) // len(wanted)
    shown = range(0, len(wanted), max(1, len(wanted) // 12))
    for index in shown:
        cells.append(Image.fromarray(np.array(center_crop(Image.open(wanted[index]["path"]), size))))
        cells += images[index * each : (index + 1) * each]
    return draw_grid(cells, [wanted[index]["text"][0] for index in shown])


def main(args: Arguments) -> None:
    """Generate, find neighbours, report."""
    data = pathlib.Path(args.data_dir)
    splits = {name: read_rows(data / name) for name in ("test", "train")}
    wanted = splits[args.split]
    if not wanted:
        raise ValueError(f"`data_dir` {args.data_dir!r} has no role, gender and tone in {args.split!r}.")
    if args.num_prompts is not None and args.num_prompts < len(wanted):
        wanted = [wanted[len(wanted) * number // args.num_prompts] for number in range(args.num_prompts)]
    pipe = load_pipeline(args.pretrained_model_name_or_path, make_accelerator())
    give_text_encoder(pipe, args.pretrained_text_encoder)
    size = pipe.transformer.config.grid_height * pipe.vae.stride
    candidates = read_candidates([*splits["test"], *splits["train"]], size)
    by_role = {role: rows for role, (rows, _) in candidates.items()}
    everyone = [row for rows, _ in candidates.values() for row in rows]
    anyone = dict.fromkeys(by_role, (everyone, torch.cat([places for _, places in candidates.values()])))
    prompts = [row["text"][0] for row in wanted]
    repeated = [row for row in wanted for _ in range(args.num_images_per_prompt)]
    # Each picture is judged by the row half the list further on: by another one, and none twice.
    shift = args.num_images_per_prompt * (len(wanted) // 2)
    others = repeated[shift:] + repeated[:shift]
    # What a picture of the right role gives that knows nothing else.
    blind = [shares(by_role[row["role"]], [row] * len(by_role[row["role"]])) for row in wanted]
    chance = {name: sum(one[name] for one in blind) / len(blind) for name in blind[0]}
    real = torch.stack([candidates[row["role"]][1][by_role[row["role"]].index(row)] for row in wanted])
    limit = shares(nearest(reconstruct(pipe, real, size), wanted, candidates), wanted)
    results, pictures = [], {}
    with tqdm(total=len(repeated) * len(args.guidance_scales)) as bar:
        for scale in args.guidance_scales:
            pictures[scale] = generate(pipe, prompts, scale, args, bar)
            points = read_pixels(pictures[scale], size)
            found = nearest(points, repeated, candidates)
            result = {"guidance_scale": scale, "right": shares(found, repeated)}
            result["shuffled"] = shares(nearest(points, others, candidates), others)
            exact = [a is b for a, b in zip(nearest(points, repeated, anyone), repeated, strict=True)]
            result["right"]["among_all_roles"] = sum(exact) / len(exact)
            result["confusion"] = {name: confusion(found, repeated, name) for name in ATTRIBUTES}
            results.append(result)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    report = {"split": args.split, "num_prompts": len(wanted), "num_images_per_prompt": args.num_images_per_prompt}
    report |= {"seed": args.seed, "settings": {**pipe.generation_defaults, **given}}
    report |= {"chance": chance, "limit": limit, "results": results}
    best = max(results, key=lambda result: result["right"]["both"])["guidance_scale"]
    with atomic_folder(args.output_dir) as folder:
        (folder / "metrics.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        draw_curve(report, folder / "guidance.png")
        draw_samples(wanted, pictures[best], size).save(folder / "samples.png")
    for result in results:
        print(
            f"guidance {result['guidance_scale']:g}: {result['right']}, shuffled prompts {result['shuffled']['both']}"
        )
    print(f"chance {chance}, limit of the tokenizer {limit}")


if __name__ == "__main__":
    main(parse_arguments(Arguments))

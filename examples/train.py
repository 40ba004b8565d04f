# SPDX-License-Identifier: Apache-2.0
"""Train a class-conditional MAR on a folder of pictures.

    accelerate launch examples/train.py --train_data_dir data/emoji --output_dir out/mar --tokenizer out/tokenizer

While it runs, `output_dir` holds a pipeline with the averaged weights that `MARPipeline.from_pretrained` loads,
`samples/` one grid of pictures every `validation_steps` (a row for each class), and the loss as `loss.csv` and
`loss.png`. The recipe is that of arXiv:2406.11838, appendix B; the sampler starts at `max_timestep`, so that young
models make pictures.
"""

import csv
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from datasets import ClassLabel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from image_data import ImageTransform, augment, load_image_dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from mar_hf import (
    ImageTokenizer,
    ImageTokenizerConfig,
    MARConfig,
    MARForImageGeneration,
    MARPipeline,
    TokenDDPMScheduler,
    build_model_card,
)
from mar_hf.utils import atomic_folder


@dataclass
class Arguments:
    """Settings of a training run."""

    train_data_dir: str = field(metadata={"help": "image folder, parquet folder or saved dataset"})
    output_dir: str = field(metadata={"help": "where the pipeline, samples and the loss curve go"})
    resolution: int = field(default=32, metadata={"help": "side of the pictures in pixels"})
    random_flip: bool = field(default=False, metadata={"help": "mirror half of the pictures"})
    random_shift: int = field(default=0, metadata={"help": "shift pictures by up to so many pixels"})
    tokenizer: str | None = field(default=None, metadata={"help": "image tokenizer, folder or hub id; none: pixels"})
    patch_size: int = field(default=4, metadata={"help": "pixels along a token's side, without a tokenizer"})

    preset: str = field(default="base", metadata={"help": "base, large or huge; the sizes below override it"})
    hidden_size: int | None = field(default=None, metadata={"help": "width of the transformer"})
    num_encoder_layers: int | None = field(default=None, metadata={"help": "blocks of the encoder"})
    num_decoder_layers: int | None = field(default=None, metadata={"help": "blocks of the decoder"})
    num_attention_heads: int | None = field(default=None, metadata={"help": "attention heads"})
    num_class_tokens: int | None = field(default=None, metadata={"help": "class tokens before the sequence"})
    head_num_layers: int | None = field(default=None, metadata={"help": "blocks of the diffusion head"})
    head_hidden_size: int | None = field(default=None, metadata={"help": "width of the diffusion head"})
    head_batch_multiplier: int = field(default=4, metadata={"help": "draws of noise per token and step"})
    dropout: float = field(default=0.1, metadata={"help": "of attention and of hidden states"})
    class_dropout_prob: float = field(default=0.1, metadata={"help": "share of labels dropped, for guidance"})
    mask_ratio_min: float = field(default=0.7, metadata={"help": "least share of masked tokens"})
    mask_ratio_std: float = field(default=0.25, metadata={"help": "deviation of the masking ratio around 1"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "save memory, recompute activations"})

    train_batch_size: int = field(default=64, metadata={"help": "pictures a step and process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches an optimizer step"})
    max_train_steps: int = field(default=5000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=1e-4, metadata={"help": "after the warm-up"})
    lr_scheduler: str = field(default="constant_with_warmup", metadata={"help": "a name of diffusers' schedulers"})
    lr_warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    adam_beta1: float = field(default=0.9, metadata={"help": "of AdamW"})
    adam_beta2: float = field(default=0.95, metadata={"help": "of AdamW"})
    adam_weight_decay: float = field(default=0.02, metadata={"help": "not for biases, norms and the head"})
    max_grad_norm: float = field(default=3.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(default=0.9999, metadata={"help": "decay of the averaged weights, after its warm-up"})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that read pictures"})
    seed: int = field(default=0, metadata={"help": "of everything random"})

    max_timestep: int = field(default=950, metadata={"help": "where the saved sampler starts; 999 is the original's"})
    validation_steps: int = field(default=500, metadata={"help": "save the pipeline and samples every so many steps"})
    validation_images: int = field(default=6, metadata={"help": "samples of each class"})
    num_inference_steps: int = field(default=32, metadata={"help": "autoregressive steps of samples; saved"})
    num_diffusion_steps: int = field(default=50, metadata={"help": "head steps of samples; saved"})
    guidance_scale: float = field(default=3.0, metadata={"help": "guidance of samples; saved"})


@torch.no_grad()
def build_tokenizer(args: Arguments, loader: DataLoader) -> ImageTokenizer:
    """The given tokenizer, or pixels scaled to zero mean and unit deviation per channel."""
    if args.tokenizer is not None:
        return ImageTokenizer.from_pretrained(args.tokenizer)
    pictures = torch.cat([batch["pixel_values"] for batch, _ in zip(loader, range(64), strict=False)])
    pixels = pictures.transpose(0, 1).flatten(1)
    config = ImageTokenizerConfig(
        patch_size=args.patch_size, shift_factor=pixels.mean(1).tolist(), scaling_factor=(1 / pixels.std(1)).tolist()
    )
    return ImageTokenizer(config).eval()


def build_model(args: Arguments, tokenizer: ImageTokenizer, num_classes: int) -> MARForImageGeneration:
    """A model of the settings' size, with random weights."""
    if args.resolution % tokenizer.stride:
        raise ValueError(f"`resolution` has to be a multiple of {tokenizer.stride}, got {args.resolution}.")
    sizes = ("hidden_size", "num_encoder_layers", "num_decoder_layers", "num_attention_heads", "num_class_tokens")
    overrides = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    head_config = MARConfig.preset(args.preset).head_config
    head_config["num_layers"] = args.head_num_layers or head_config["num_layers"]
    head_config["hidden_size"] = args.head_hidden_size or head_config["hidden_size"]
    config = MARConfig.preset(
        args.preset,
        grid_height=args.resolution // tokenizer.stride,
        grid_width=args.resolution // tokenizer.stride,
        token_dim=tokenizer.token_dim,
        num_classes=num_classes,
        head_config=head_config,
        head_batch_multiplier=args.head_batch_multiplier,
        attention_dropout=args.dropout,
        hidden_dropout=args.dropout,
        class_dropout_prob=args.class_dropout_prob,
        mask_ratio_min=args.mask_ratio_min,
        mask_ratio_std=args.mask_ratio_std,
        **overrides,
    )
    return MARForImageGeneration(config)


def parameter_groups(model: MARForImageGeneration, weight_decay: float) -> list[dict]:
    """The original's groups: no decay for vectors and for the head; embeddings are decayed."""
    decayed = {name: p.ndim > 1 and not name.startswith("head.") for name, p in model.named_parameters()}
    return [
        {"params": [p for name, p in model.named_parameters() if decayed[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in model.named_parameters() if not decayed[name]], "weight_decay": 0.0},
    ]


def endless(loader: DataLoader) -> Iterator[dict]:
    """Epoch after epoch."""
    while True:
        yield from loader


def plot_loss(losses: list[tuple[int, float]], folder: pathlib.Path) -> None:
    """Write `loss.csv` and `loss.png`."""
    with open(folder / "loss.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *losses])
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(*zip(*losses, strict=True))
    axes.set(xlabel="step", ylabel="loss (mean squared error + variational bound)", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def validate(args: Arguments, pipe: MARPipeline, step: int, num_params: int) -> None:
    """Save the pipeline with its card, and a grid with a row of samples for each class."""
    folder = pathlib.Path(args.output_dir)
    labels = pipe.config.id2label
    classes = [None] if labels is None else list(range(min(len(labels), 40)))
    columns = args.validation_images
    generators = [torch.Generator().manual_seed(1000 * row + i) for row in range(len(classes)) for i in range(columns)]
    class_labels = None if labels is None else [number for number in classes for _ in range(columns)]
    count = 1 if class_labels is not None else columns
    images = pipe(class_labels=class_labels, num_images_per_prompt=count, generator=generators).images
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    grid = make_image_grid(images, rows=len(classes), cols=columns, resize=max(64, args.resolution))
    grid.save(folder / "samples" / f"step_{step:06d}.png")

    description = (
        f"A masked autoregressive model over continuous tokens (MAR, arXiv:2406.11838), {num_params / 1e6:.1f} "
        f"million parameters, trained with `examples/train.py` for {step} steps of batch {args.train_batch_size} at "
        f"{args.resolution} x {args.resolution} pixels.\n\n![samples](samples.png)"
    )
    with atomic_folder(folder / "pipeline", overwrite=True) as target:
        pipe.save_pretrained(target)
        grid.save(pathlib.Path(target) / "samples.png")
        names = None if labels is None else [labels[number] for number in sorted(labels)]
        card = build_model_card(str(folder / "pipeline"), description, class_names=names)
        card.save(pathlib.Path(target) / "README.md")


def main(args: Arguments) -> None:
    """Train, sampling and saving on the way."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # A batch need not touch every parameter: the mask token where nothing is masked, say.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_seed(args.seed)
    generator = torch.Generator(accelerator.device).manual_seed(args.seed + accelerator.process_index)
    augment_generator = torch.Generator().manual_seed(args.seed + accelerator.process_index)

    dataset = load_image_dataset(args.train_data_dir)
    feature = dataset.features.get("label")
    names = feature.names if isinstance(feature, ClassLabel) else None
    if len(dataset) < args.train_batch_size:
        raise ValueError(f"{len(dataset)} pictures are fewer than `train_batch_size` {args.train_batch_size}.")
    loader = DataLoader(
        dataset.with_transform(ImageTransform(args.resolution)),
        args.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
    )
    tokenizer = build_tokenizer(args, loader).requires_grad_(False).to(accelerator.device)
    model = build_model(args, tokenizer, len(names) if names else 1)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    num_params = sum(p.numel() for p in model.parameters())
    noise_scheduler = TokenDDPMScheduler(max_timestep=args.max_timestep)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.adam_weight_decay),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    model.train()
    unwrapped = accelerator.unwrap_model(model)
    ema = EMAModel(unwrapped.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)

    def save_and_sample(step: int) -> None:
        ema.store(unwrapped.parameters())
        ema.copy_to(unwrapped.parameters())
        pipe = MARPipeline(
            transformer=unwrapped.eval(),
            vae=tokenizer,
            scheduler=noise_scheduler,
            id2label=dict(enumerate(names)) if names else None,
            generation_defaults={
                "num_inference_steps": min(args.num_inference_steps, unwrapped.config.num_tokens),
                "num_diffusion_steps": args.num_diffusion_steps,
                "guidance_scale": args.guidance_scale,
            },
        )
        pipe.set_progress_bar_config(disable=True)
        validate(args, pipe, step, num_params)
        ema.restore(unwrapped.parameters())
        unwrapped.train()

    step, losses, recent = 0, [], []
    progress = tqdm(total=args.max_train_steps, disable=not accelerator.is_main_process)
    for batch in endless(loader):
        with accelerator.accumulate(model):
            pictures = augment(batch["pixel_values"], augment_generator, args.random_flip, args.random_shift)
            with torch.no_grad():
                tokens = tokenizer.encode(pictures, generator=generator).tokens
            labels = batch["label"] if names else None
            loss = model(tokens, class_labels=labels, noise_scheduler=noise_scheduler, generator=generator).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        recent.append(loss.detach())
        if not accelerator.sync_gradients:
            continue
        ema.step(unwrapped.parameters())
        step += 1
        progress.update()
        last = step == args.max_train_steps
        if step % 20 == 0 or last:
            mean = accelerator.reduce(torch.stack(recent).mean(), "mean").item()
            recent.clear()
            losses.append((step, mean))
            progress.set_postfix(loss=f"{mean:.4f}", lr=f"{lr_scheduler.get_last_lr()[0]:.2e}")
        if (step % args.validation_steps == 0 or last) and accelerator.is_main_process:
            save_and_sample(step)
            plot_loss(losses, pathlib.Path(args.output_dir))
        if last:
            break
    accelerator.end_training()


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])

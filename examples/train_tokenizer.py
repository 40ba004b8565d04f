# SPDX-License-Identifier: Apache-2.0
"""Train a small image tokenizer on a folder of pictures.

    accelerate launch examples/train_tokenizer.py --config examples/configs/emoji_tokenizer.json \\
        --train_data_dir data/emoji --output_dir out/tokenizer

The autoencoder is one of diffusers': `kl` (AutoencoderKL, whose encoder predicts its posterior's deviation), `dc`
(AutoencoderDC with residual blocks only, no layer at full resolution, several times quicker on a CPU; its posterior
has the fixed deviation `latent_noise`) or `vq` (VQModel, whose latents are replaced by the nearest of `num_codes`
vectors). The loss is the mean absolute error + the mean squared error, + `kl_weight` times the mean divergence of the
posterior from N(0, 1) per latent number or, for `vq`, the squared distance of latents and their vectors
(arXiv:1711.00937), if asked for + a distance in features, and + the verdict of a discriminator of patches, as latent
diffusion has it (arXiv:2112.10752). At the end the latents' mean and deviation are measured per channel over the data,
so that tokens have zero mean and unit variance.

`output_dir` then is an `ImageTokenizer`; beside it lie `grid.png` (pictures above their reconstructions), `loss.csv`,
`loss.png`, `samples/`, and `checkpoint-<step>/`, from which `--resume_from_checkpoint latest` goes on exactly.
"""

import logging
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from datasets import Dataset
from diffusers import AutoencoderDC, AutoencoderKL, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from image_data import ImageTransform, load_image_dataset
from PIL import Image
from reconstruction_losses import PatchDiscriminator, PerceptualLoss, discriminator_loss
from torch.func import functional_call
from torch.utils.data import DataLoader
from training_utils import (
    Collator,
    Progress,
    check_finite,
    check_output_dir,
    example_generators,
    make_accelerator,
    parse_arguments,
    resume,
    training_loop,
    write_curves,
)

from mar_hf import ImageTokenizer


logger = get_logger(__name__)

HELD_OUT = ("validation", "test")
Autoencoder = AutoencoderKL | AutoencoderDC | VQModel


@dataclass
class Arguments:
    """Settings of the tokenizer's training."""

    train_data_dir: str = field(metadata={"help": "image folder, parquet folder or saved dataset"})
    output_dir: str = field(metadata={"help": "where the image tokenizer goes"})
    validation_data_dir: str | None = field(
        default=None,
        metadata={"help": "for the PSNR; default: `validation` or `test` in the data, else the data"},
    )
    resolution: int = field(default=32, metadata={"help": "side of the pictures in pixels"})
    random_flip: bool = field(default=False, metadata={"help": "mirror half of the pictures"})
    random_shift: int = field(default=0, metadata={"help": "shift pictures by up to so many pixels"})

    autoencoder: str = field(default="kl", metadata={"help": "kl, dc or vq"})
    block_out_channels: list[int] = field(
        default_factory=lambda: [32, 64, 128], metadata={"help": "channels at each resolution, halved between them"}
    )
    layers_per_block: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "residual blocks: one number, or (dc) one a resolution"},
    )
    latent_channels: int = field(default=8, metadata={"help": "channels of the latent grid"})
    latent_noise: float = field(default=0.3, metadata={"help": "deviation of the dc autoencoder's posterior"})

    num_codes: int = field(default=256, metadata={"help": "vectors of the vq autoencoder's codebook"})
    code_restart_steps: int = field(default=20, metadata={"help": "codes not used for so many steps start anew"})
    quantize: bool = field(
        default=False, metadata={"help": "tokens are vectors of the codebook; default: latents before quantisation"}
    )

    kl_weight: float = field(default=3e-3, metadata={"help": "weight of the posterior's divergence from N(0, 1)"})
    perceptual_weight: float = field(default=0.0, metadata={"help": "weight of the distance in features"})
    perceptual_weights: str | None = field(
        default=None, metadata={"help": "TorchScript file of features; default: EfficientNet-Lite0, if installed"}
    )
    discriminator_start: int | None = field(
        default=None, metadata={"help": "step from which a discriminator takes part; default: never"}
    )
    discriminator_weight: float = field(
        default=0.5, metadata={"help": "its gradient at the last layer, against that of all other terms"}
    )

    train_batch_size: int = field(default=64, metadata={"help": "pictures a step and process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches an optimizer step"})
    max_train_steps: int = field(default=2000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the cosine schedule"})
    lr_warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    ema_decay: float = field(default=0.999, metadata={"help": "decay of the averaged weights, which are saved"})
    mixed_precision: str | None = field(default=None, metadata={"help": "no, bf16 or fp16; default: accelerate's"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that read pictures"})
    seed: int = field(default=0, metadata={"help": "of everything random"})

    logging_steps: int = field(default=20, metadata={"help": "steps between noted losses"})
    validation_steps: int = field(default=500, metadata={"help": "steps between reconstructions"})
    checkpointing_steps: int = field(default=500, metadata={"help": "optimizer steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "the newest so many checkpoints stay"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": '"latest", or a checkpoint in `output_dir`: its name or path'}
    )

    def __post_init__(self) -> None:
        positive = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "logging_steps")
        positive += ("validation_steps", "checkpointing_steps", "checkpoints_total_limit")
        for name in (*positive, "num_codes", "code_restart_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` has to be at least 1, got {getattr(self, name)}.")
        if self.autoencoder not in ("kl", "dc", "vq"):
            raise ValueError(f"`autoencoder` has to be kl, dc or vq, got {self.autoencoder!r}.")
        if self.autoencoder == "dc" and not self.latent_noise > 0:
            raise ValueError(f"`latent_noise` has to be above 0 for `autoencoder` dc, got {self.latent_noise}.")
        if self.quantize and self.autoencoder != "vq":
            raise ValueError(f"`quantize` goes with `autoencoder` vq only, got {self.autoencoder!r}.")
        levels, layers = len(self.block_out_channels), self.layers_per_block
        if len(layers) != (levels if self.autoencoder == "dc" else 1):
            raise ValueError(
                f"`layers_per_block` has to be one number (kl, vq) or one a resolution (dc), got {layers}."
            )
        if self.resolution % 2 ** (levels - 1):
            raise ValueError(f"`resolution` has to be a multiple of {2 ** (levels - 1)}, got {self.resolution}.")
        if self.perceptual_weights is not None and not self.perceptual_weight:
            raise ValueError("`perceptual_weights` is used with a `perceptual_weight` above 0 only.")
        precision = self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
        if self.discriminator_start is not None and precision == "fp16":
            # Accelerate has one loss scale, and changes it between the two optimizers' steps.
            raise ValueError("`mixed_precision` fp16 does not go with a discriminator: use bf16 or no.")


def build_autoencoder(args: Arguments) -> Autoencoder:
    """The autoencoder of the settings, with random weights."""
    levels = len(args.block_out_channels)
    if args.autoencoder != "dc":
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": args.block_out_channels,
            "layers_per_block": args.layers_per_block[0],
            "latent_channels": args.latent_channels,
            "norm_num_groups": math.gcd(16, *args.block_out_channels),
            "sample_size": args.resolution,
        }
        if args.autoencoder == "kl":
            return AutoencoderKL(**blocks)
        vae = VQModel(**blocks, num_vq_embeddings=args.num_codes)
        # As published: the encoder follows the codebook a quarter as strongly as the codebook follows the encoder.
        # With diffusers' default it is the other way round.
        vae.quantize.legacy = False
        return vae
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_types", "ResBlock"),
            ("block_out_channels", args.block_out_channels),
            ("layers_per_block", args.layers_per_block),
            ("qkv_multiscales", ((),) * levels),
        )
    }
    return AutoencoderDC(
        latent_channels=args.latent_channels,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        **sides,
    )


class Reconstruction(torch.nn.Module):
    """Encoding, a draw from the posterior and decoding as one `forward`, so that processes share their gradients.

    Args:
        vae (`Autoencoder`): what is trained.
        latent_noise (`float`): deviation of the posterior, where the encoder predicts none.
    """

    def __init__(self, vae: Autoencoder, latent_noise: float):
        super().__init__()
        self.vae = vae
        self.latent_noise = latent_noise
        if isinstance(vae, VQModel):
            # How often each code was used of late: a part of what resuming needs.
            self.register_buffer("usage", torch.zeros(vae.config.num_vq_embeddings))

    def forward(
        self, pictures: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The pictures again, the term that holds the latents together; for VQ, latents (rows, c) and their codes."""
        encoded = self.vae.encode(pictures)
        if isinstance(self.vae, VQModel):
            quantised, commitment, (_, _, codes) = self.vae.quantize(encoded.latents)
            restored = self.vae.decode(quantised, force_not_quantize=True).sample
            return restored, commitment, encoded.latents.detach().permute(0, 2, 3, 1).flatten(0, 2), codes
        if isinstance(self.vae, AutoencoderKL):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean, std = encoded.latent, torch.full_like(encoded.latent, self.latent_noise)
        noise = randn_tensor(mean.shape, generators, mean.device, torch.float32).to(mean)
        restored = self.vae.decode(mean + std * noise).sample
        mean, std = mean.float(), std.float()
        return restored, 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean(), None, None


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """How many codes, all used alike, would be as varied as these.

    Args:
        counts (`torch.Tensor` of shape `(num_codes,)`): how often each code was used.

    Returns:
        `torch.Tensor`: a scalar from 1 to `num_codes`.
    """
    shares = counts / counts.sum()
    return torch.special.entr(shares).sum().exp()


@torch.no_grad()
def latent_statistics(tokenizer: ImageTokenizer, batches: list[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and deviation of the latents that training sees, one number a channel."""
    generator = torch.Generator(device=tokenizer.device).manual_seed(0)
    latents = [tokenizer.encode(batch.to(tokenizer.device), generator=generator).latents for batch in batches]
    latents = torch.cat([batch.transpose(0, 1).flatten(1) for batch in latents], 1)
    return latents.mean(1).tolist(), latents.std(1).tolist()


def some_pictures(dataset: Dataset, batch_size: int) -> list[torch.Tensor]:
    """At most 64 batches, always the same."""
    loader = DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    return [batch["pixel_values"] for batch, _ in zip(loader, range(64), strict=False)]


class Trainer:
    """A run: its data, autoencoder, discriminator, optimizers, and what it writes.

    Args:
        args (`Arguments`): settings.
    """

    def __init__(self, args: Arguments):
        self.args = args
        self.accelerator = accelerator = make_accelerator(
            mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
        )
        check_output_dir(args)
        transform = ImageTransform(args.resolution)
        load = partial(load_image_dataset, caption_column=None)
        self.dataset = load(args.train_data_dir).with_transform(transform)
        self.collate = Collator(args.seed, args.random_flip, args.random_shift)
        folders = [pathlib.Path(args.train_data_dir, name) for name in HELD_OUT]
        held_out = args.validation_data_dir or next((str(folder) for folder in folders if folder.is_dir()), None)
        self.held_out = load(held_out).with_transform(transform) if held_out else None

        set_seed(args.seed)
        self.vae = build_autoencoder(args)
        self.perceptual = None
        if args.perceptual_weight:
            self.perceptual = PerceptualLoss(args.perceptual_weights).to(accelerator.device)
        self.model, self.optimizer, self.lr_scheduler = self.prepare(
            Reconstruction(self.vae, args.latent_noise), (0.9, 0.95)
        )
        self.reconstruction = accelerator.unwrap_model(self.model)
        self.trained = list(self.vae.parameters())
        self.ema = EMAModel(self.trained, decay=args.ema_decay, use_ema_warmup=True, power=0.75)
        self.progress = Progress(len(self.dataset), args.seed)
        self.discriminator = None
        if args.discriminator_start is not None:
            # Patches of small pictures are seen by fewer layers.
            num_layers = max(1, min(3, int(math.log2(args.resolution)) - 3))
            self.discriminator, self.discriminator_optimizer, self.discriminator_scheduler = self.prepare(
                PatchDiscriminator(num_layers=num_layers), (0.5, 0.9), args.discriminator_start
            )
        accelerator.register_for_checkpointing(self.ema, self.progress)

    def prepare(self, model: torch.nn.Module, betas: tuple[float, float], start: int = 0) -> tuple:
        """A model, its optimizer and its schedule from a step on, ready for all processes and for checkpoints."""
        args = self.args
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=betas, weight_decay=0.0)
        # Not prepared: accelerate's wrapper takes a step for every process.
        scheduler = get_scheduler(
            "cosine", optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps - start
        )
        self.accelerator.register_for_checkpointing(scheduler)
        return *self.accelerator.prepare(model, optimizer), scheduler

    def judge(self, restored: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """The generator's adversarial term, scaled to the gradient of all others at the decoder's last layer."""
        # As constants: only `restored` is to get a gradient here.
        discriminator = self.accelerator.unwrap_model(self.discriminator)
        weights = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
        verdict = -functional_call(discriminator, weights, restored).float().mean()
        last = next(self.vae.decoder.conv_out.parameters())
        gradients = torch.stack([torch.autograd.grad(t, last, retain_graph=True)[0] for t in (loss, verdict)])
        # Every process takes the weight that one with all pictures would.
        norms = self.accelerator.reduce(gradients.float(), "mean").flatten(1).norm(dim=1)
        return self.args.discriminator_weight * (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4) * verdict

    def step(self, batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One optimizer step from as many batches as are accumulated: its losses, means over the batches."""
        accelerator, args = self.accelerator, self.args
        adversarial = self.discriminator is not None and self.progress.step >= args.discriminator_start
        models = [self.model, *([self.discriminator] if adversarial else [])]
        rows: list[dict[str, torch.Tensor]] = []
        quantised: list[tuple[torch.Tensor, torch.Tensor]] = []
        for batch in batches:
            with accelerator.accumulate(*models):
                pictures = batch["pixel_values"].to(accelerator.device, non_blocking=True)
                generators = example_generators(args.seed, batch["position"], accelerator.device)
                restored, regulariser, latents, codes = self.model(pictures, generators)
                error = restored - pictures
                row = {"reconstruction_loss": error.abs().mean() + error.square().mean()}
                if codes is None:
                    row["kl"], weight = regulariser, args.kl_weight
                else:
                    row["commitment_loss"], weight = regulariser, 1.0
                    quantised.append((latents, codes))
                loss = row["reconstruction_loss"]
                if self.perceptual is not None:
                    row["perceptual_loss"] = self.perceptual(pictures, restored)
                    loss = loss + args.perceptual_weight * row["perceptual_loss"]
                if adversarial:
                    loss = loss + self.judge(restored, loss)
                accelerator.backward(loss + weight * regulariser)
                name = "reconstruction_loss"
                row[name] = self.update(self.model, self.optimizer, row[name].detach())
                if adversarial:
                    both = torch.cat([pictures, restored.detach()])
                    row["discriminator_loss"] = discriminator_loss(self.discriminator(both))
                    accelerator.backward(row["discriminator_loss"])
                    name = "discriminator_loss"
                    row[name] = self.update(self.discriminator, self.discriminator_optimizer, row[name].detach())
            rows.append({name: value.detach() for name, value in row.items()})
        if not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        if adversarial:
            self.discriminator_scheduler.step()
        self.ema.step(self.trained)
        result = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
        if quantised:
            result |= self.watch_codes(*map(torch.cat, zip(*quantised, strict=True)))
        self.progress.step += 1
        self.progress.position += args.train_batch_size * accelerator.num_processes * len(batches)
        return result

    @torch.no_grad()
    def watch_codes(self, latents: torch.Tensor, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Start unused codes anew, after the first step and then now and then; most would never be the nearest to any.

        They become latents of this step, the likelier the farther these are from their own codes. All processes see
        all latents and draw from the same generator, which depends on seed and step only. The optimizer's averages of
        an unused code need no reset: without gradients they have all but vanished.

        Args:
            latents (`torch.Tensor` of shape `(rows, latent_channels)`): of this process, before quantisation.
            codes (`torch.Tensor` of shape `(rows,)`): the nearest to each.

        Returns:
            `dict[str, torch.Tensor]`: share of the codes that the step used, and their perplexity.
        """
        accelerator, step, usage = self.accelerator, self.progress.step, self.reconstruction.usage
        codes = accelerator.gather(codes)
        counts = torch.zeros_like(usage).index_add_(0, codes, torch.ones_like(codes, dtype=usage.dtype))
        usage += counts
        if step % self.args.code_restart_steps == 0:
            codebook, latents = self.vae.quantize.embedding.weight, accelerator.gather(latents).float()
            unused = (usage == 0).nonzero()[:, 0]
            if len(unused):
                errors = (latents - codebook[codes]).square().sum(1).cpu() + 1e-12
                generator = example_generators(self.args.seed, [step], stream=2)[0]
                drawn = torch.multinomial(errors, len(unused), replacement=True, generator=generator)
                averages = (a for a, p in zip(self.ema.shadow_params, self.trained, strict=True) if p is codebook)
                for vectors in (codebook, *averages):
                    vectors[unused] = latents[drawn.to(latents.device)]
            usage.zero_()
        return {"codes_used": (counts > 0).float().mean(), "perplexity": perplexity(counts)}

    def update(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
        """An optimizer's step, where this batch completes one; the loss, or the norm where that is not finite."""
        if self.accelerator.sync_gradients:
            norm = torch.as_tensor(self.accelerator.clip_grad_norm_(model.parameters(), 1.0), device=loss.device)
            if self.accelerator.scaler is None:
                # Such a gradient spoils the weights as surely as such a loss; a scaler leaves the step out.
                loss = torch.where(norm.isfinite(), loss, norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def flush(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Note the mean losses of the last steps, which waits for the device.

        Args:
            rows (`list[dict[str, torch.Tensor]]`): what `step` returned.

        Returns:
            `dict[str, float]`: the row of `loss.csv`.

        Raises:
            FloatingPointError: if a loss is not finite.
        """
        result: dict[str, float] = {"step": self.progress.step, "learning_rate": self.lr_scheduler.get_last_lr()[0]}
        for name in dict.fromkeys(name for row in rows for name in row):
            # Some begin in between.
            values = torch.stack([row[name] for row in rows if name in row])
            values = self.accelerator.reduce(values, "mean")
            check_finite(name, values, self)
            result[name] = values.mean().item()
        self.progress.history.append(result)
        return result

    @contextmanager
    def averaged(self) -> Iterator[Autoencoder]:
        """The autoencoder, for this while with its averaged weights."""
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        try:
            yield self.vae.eval()
        finally:
            self.ema.restore(self.trained)
            self.vae.train()

    @torch.no_grad()
    def measure(self, tokenizer: ImageTokenizer) -> tuple[float, int, Image.Image]:
        """PSNR over held-out pictures, or training ones where there are no others; their number; a grid of some."""
        batches = some_pictures(self.held_out or self.dataset, self.args.train_batch_size)
        restored = [tokenizer(batch.to(tokenizer.device)).clamp(-1, 1).cpu() for batch in batches]
        # Peak-to-peak is 2 in [-1, 1].
        errors = torch.cat([(a - b).square().mean((1, 2, 3)) for a, b in zip(batches, restored, strict=True)])
        psnr = (10 * torch.log10(4 / errors.clamp(min=1e-10))).mean().item()
        pictures = VaeImageProcessor().postprocess(torch.cat([batches[0][:16], restored[0][:16]]))
        return psnr, len(errors), make_image_grid(pictures, rows=2, cols=len(pictures) // 2, resize=96)

    @torch.no_grad()
    def measure_codes(self) -> str:
        """How many codes the pictures of `measure` use, in words."""
        counts = torch.zeros_like(self.reconstruction.usage)
        for batch in some_pictures(self.held_out or self.dataset, self.args.train_batch_size):
            codes = self.vae.quantize(self.vae.encode(batch.to(counts.device)).latents)[2][2]
            counts += codes.bincount(minlength=len(counts))
        return f", {(counts > 0).sum()} of {len(counts)} codes in use, perplexity {perplexity(counts):.1f},"

    def validate(self) -> None:
        """Write a grid and the curves; every process calls this."""
        if self.accelerator.is_main_process:
            with self.averaged() as vae:
                psnr, _, grid = self.measure(ImageTokenizer.from_autoencoder(vae))
            self.progress.history[-1]["psnr"] = psnr
            folder = pathlib.Path(self.args.output_dir, "samples")
            folder.mkdir(parents=True, exist_ok=True)
            grid.save(folder / f"step_{self.progress.step:06d}.png")
            write_curves(self.progress.history, self.args.output_dir)
        self.accelerator.wait_for_everyone()

    def save(self) -> str:
        """Write the tokenizer with the statistics of its latents. Returns what there is to say of it."""
        args = self.args
        with self.averaged() as vae:
            wrap = partial(ImageTokenizer.from_autoencoder, vae, quantize=args.quantize)
            plain = wrap(scaling_factor=1.0, shift_factor=0.0)
            mean, std = latent_statistics(plain, some_pictures(self.dataset, args.train_batch_size))
            tokenizer = wrap(scaling_factor=[1 / s for s in std], shift_factor=mean)
            psnr, count, grid = self.measure(tokenizer)
            usage = self.measure_codes() if isinstance(vae, VQModel) else ""
            with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".tokenizer-") as folder:
                tokenizer.save_pretrained(folder)
                grid.save(pathlib.Path(folder, "grid.png"))
                # Without a configuration nothing is loaded, so weights never meet those of another run.
                pathlib.Path(args.output_dir, "config.json").unlink(missing_ok=True)
                for name in ("model.safetensors", "grid.png", "config.json"):
                    os.replace(pathlib.Path(folder, name), pathlib.Path(args.output_dir, name))
        kind = "training" if self.held_out is None else "held-out"
        return f"PSNR {psnr:.2f} dB{usage} over {count} {kind} pictures; tokenizer in {args.output_dir}"


def main(args: Arguments) -> None:
    """Train, measure, save."""
    logging.basicConfig(level=logging.WARNING)
    trainer = Trainer(args)
    accelerator = trainer.accelerator
    resume(trainer)
    training_loop(trainer)
    if accelerator.is_main_process:
        print(trainer.save())
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_arguments(Arguments))

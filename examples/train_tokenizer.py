# SPDX-License-Identifier: Apache-2.0
"""Train a small image tokenizer on a folder of pictures.

    accelerate launch examples/train_tokenizer.py --train_data_dir data/emoji --output_dir out/tokenizer

The autoencoder is one of diffusers': `kl` (AutoencoderKL, whose encoder predicts its posterior's deviation) or `dc`
(AutoencoderDC with residual blocks only, no layer at full resolution, several times quicker on a CPU; its posterior
has the fixed deviation `latent_noise`). The loss is the mean absolute error + the mean squared error + `kl_weight`
times the mean divergence of the posterior from N(0, 1) per latent number. At the end the latents' mean and deviation
are measured per channel over the data, so that tokens have zero mean and unit variance, and an `ImageTokenizer` is
written, with its PSNR and a grid of reconstructions.
"""

import pathlib
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from image_data import ImageTransform, augment, load_image_dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from mar_hf import ImageTokenizer
from mar_hf.utils import atomic_folder


@dataclass
class Arguments:
    """Settings of the tokenizer's training."""

    train_data_dir: str = field(metadata={"help": "image folder, parquet folder or saved dataset"})
    output_dir: str = field(metadata={"help": "where the image tokenizer goes"})
    resolution: int = field(default=32, metadata={"help": "side of the pictures in pixels"})
    autoencoder: str = field(default="kl", metadata={"help": "kl or dc"})
    block_out_channels: list[int] = field(
        default_factory=lambda: [32, 64, 128], metadata={"help": "channels at each resolution, halved between them"}
    )
    layers_per_block: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "residual blocks: one number (kl), or one a resolution (dc)"}
    )
    latent_channels: int = field(default=8, metadata={"help": "channels of the latent grid"})
    latent_noise: float = field(default=0.3, metadata={"help": "deviation of the dc autoencoder's posterior"})
    kl_weight: float = field(default=3e-3, metadata={"help": "weight of the posterior's divergence from N(0, 1)"})
    train_batch_size: int = field(default=64, metadata={"help": "pictures a step and process"})
    max_train_steps: int = field(default=2000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the cosine schedule"})
    lr_warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    random_shift: int = field(default=0, metadata={"help": "shift pictures by up to so many pixels"})
    random_flip: bool = field(default=False, metadata={"help": "mirror half of the pictures"})
    ema_decay: float = field(default=0.999, metadata={"help": "decay of the averaged weights, which are saved"})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    seed: int = field(default=0, metadata={"help": "of everything random"})


def build_autoencoder(args: Arguments) -> AutoencoderKL | AutoencoderDC:
    """The autoencoder of the settings, with random weights."""
    levels = len(args.block_out_channels)
    if args.autoencoder == "kl":
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=args.block_out_channels,
            layers_per_block=args.layers_per_block[0],
            latent_channels=args.latent_channels,
            norm_num_groups=16,
            sample_size=args.resolution,
        )
    if args.autoencoder != "dc" or len(args.layers_per_block) != levels:
        raise ValueError("`autoencoder` has to be kl or dc, and dc needs one `layers_per_block` a resolution.")
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
        vae (`AutoencoderKL` or `AutoencoderDC`): what is trained.
        latent_noise (`float`): deviation of the posterior, where the encoder predicts none.
    """

    def __init__(self, vae: AutoencoderKL | AutoencoderDC, latent_noise: float):
        super().__init__()
        self.vae = vae
        self.latent_noise = latent_noise

    def forward(
        self, pictures: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pictures again, and mean and deviation of the posterior, both (B, c, H, W)."""
        encoded = self.vae.encode(pictures)
        if isinstance(self.vae, AutoencoderKL):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean, std = encoded.latent, torch.full_like(encoded.latent, self.latent_noise)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return self.vae.decode(mean + std * noise).sample, mean, std


@torch.no_grad()
def latent_statistics(tokenizer: ImageTokenizer, batches: list[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and deviation of the latents that training sees, one number a channel."""
    generator = torch.Generator(device=batches[0].device).manual_seed(0)
    latents = [tokenizer.encode(batch, generator=generator).latents for batch in batches]
    latents = torch.cat([batch.transpose(0, 1).flatten(1) for batch in latents], 1)
    return latents.mean(1).tolist(), latents.std(1).tolist()


def main(args: Arguments) -> None:
    """Train, measure, save."""
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed, device_specific=True)
    generator = torch.Generator().manual_seed(args.seed + accelerator.process_index)

    dataset = load_image_dataset(args.train_data_dir).with_transform(ImageTransform(args.resolution))
    loader = DataLoader(dataset, args.train_batch_size, shuffle=True, drop_last=len(dataset) >= args.train_batch_size)
    vae = build_autoencoder(args)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    model, optimizer, loader, scheduler = accelerator.prepare(
        Reconstruction(vae, args.latent_noise), optimizer, loader, scheduler
    )
    ema = EMAModel(vae.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)

    step = 0
    progress = tqdm(total=args.max_train_steps, disable=not accelerator.is_main_process)
    while step < args.max_train_steps:
        for batch in loader:
            pictures = augment(batch["pixel_values"], generator, args.random_flip, args.random_shift)
            restored, mean, std = model(pictures, generator)
            error = restored - pictures
            divergence = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
            loss = error.abs().mean() + error.square().mean() + args.kl_weight * divergence
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            ema.step(vae.parameters())
            step += 1
            progress.update(1)
            if step % 20 == 0:
                progress.set_postfix(
                    mae=f"{error.abs().mean().item():.4f}",
                    kl=f"{divergence.item():.3f}",
                    noise=f"{(std.mean() / mean.std()).item():.3f}",
                )
            if step == args.max_train_steps:
                break

    if accelerator.is_main_process:
        ema.copy_to(vae.parameters())
        save(args, vae.eval(), dataset, accelerator.device)
    accelerator.end_training()


def save(args: Arguments, vae: AutoencoderKL, dataset: torch.utils.data.Dataset, device: torch.device) -> None:
    """Measure the latents, write the tokenizer and a grid of pictures above their reconstructions."""
    loader = DataLoader(dataset, args.train_batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    batches = [batch["pixel_values"].to(device) for batch, _ in zip(loader, range(64), strict=False)]
    mean, std = latent_statistics(ImageTokenizer.from_autoencoder(vae, scaling_factor=1.0, shift_factor=0.0), batches)
    tokenizer = ImageTokenizer.from_autoencoder(vae, scaling_factor=[1 / s for s in std], shift_factor=mean).eval()
    with torch.no_grad():
        restored = [tokenizer(batch).clamp(-1, 1) for batch in batches]
    # Peak-to-peak is 2 in [-1, 1].
    errors = torch.cat([(a - b).square().mean((1, 2, 3)) for a, b in zip(batches, restored, strict=True)])
    psnr = (10 * torch.log10(4 / errors.clamp(min=1e-10))).mean().item()

    rows = torch.cat([batches[0][:16], restored[0][:16]]).add(1).mul(127.5).round().byte()
    pictures = tokenizer_pictures(rows)
    with atomic_folder(args.output_dir, overwrite=True) as folder:
        tokenizer.save_pretrained(folder)
        make_image_grid(pictures, rows=2, cols=len(pictures) // 2, resize=96).save(pathlib.Path(folder, "grid.png"))
    print(f"PSNR {psnr:.2f} dB over {len(errors)} training pictures; tokenizer in {args.output_dir}")


def tokenizer_pictures(rows: torch.Tensor) -> list:
    """uint8 (N, 3, H, W) to PIL pictures."""
    from PIL import Image

    return [Image.fromarray(np.ascontiguousarray(row.permute(1, 2, 0).cpu().numpy())) for row in rows]


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])

# SPDX-License-Identifier: Apache-2.0
"""The training of image tokenizers."""

import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from accelerate.utils import set_seed
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch.func import functional_call

from ..tokenizers import ImageTokenizer
from ..utils import on_white
from .arguments import TokenizerTrainingArguments
from .autoencoders import Autoencoder, Reconstruction, build_autoencoder, latent_statistics, perplexity
from .batches import Collator, example_generators
from .curves import write_curves, write_samples
from .image_data import ImageTransform, load_image_dataset, some_pictures
from .image_folders import held_out_folder
from .reconstruction_losses import PatchDiscriminator, PerceptualLoss, discriminator_loss
from .resuming import fingerprint_pictures
from .trainer_base import BaseTrainer


class TokenizerTrainer(BaseTrainer):
    """The training of a small image tokenizer on a folder of pictures.

    The autoencoder is one of diffusers': `kl` (AutoencoderKL, whose encoder predicts its posterior's deviation), `dc`
    (AutoencoderDC with residual blocks only, no layer at full resolution, several times quicker on a CPU; its
    posterior has the fixed deviation `latent_noise`) or `vq` (VQModel, whose latents are replaced by the nearest of
    `num_codes` vectors). The loss is the mean absolute error + the mean squared error, + `kl_weight` times the mean
    divergence of the posterior from N(0, 1) per latent number or, for `vq`, the squared distance of latents and their
    vectors (arXiv:1711.00937), if asked for + a distance in features, and + the verdict of a discriminator of patches,
    as latent diffusion has it (arXiv:2112.10752). At the end the latents' mean and deviation are measured per channel
    over the data, so that tokens have zero mean and unit variance. With another `normalizer` than `affine` the decoder
    is trained on normalised tokens instead, which follows the draw from the posterior, and nothing is measured.

    `output_dir` then is an `ImageTokenizer`; beside it lie `grid.png` (pictures above their reconstructions),
    `loss.csv`, `loss.png`, `samples/`, and `checkpoint-<step>/`.

    Args:
        args (`TokenizerTrainingArguments`): settings.

    Raises:
        ValueError: if the data can't be read, or `output_dir` holds another run.

    Example:
        >>> TokenizerTrainer(TokenizerTrainingArguments(train_data_dir="data", output_dir="tokenizer")).train()
        >>> tokenizer = ImageTokenizer.from_pretrained("tokenizer")
    """

    arguments_class = TokenizerTrainingArguments
    args: TokenizerTrainingArguments

    def __init__(self, args: TokenizerTrainingArguments):
        super().__init__(args)
        transform = ImageTransform(args.resolution, args.image_channels)
        load = partial(load_image_dataset, caption_column=None)
        self.dataset = load(args.train_data_dir).with_transform(transform)
        self.collate = Collator(args.seed, args.random_flip, args.random_shift)
        held_out = args.validation_data_dir or held_out_folder(args.train_data_dir)
        self.held_out = load(held_out).with_transform(transform) if held_out else None

        set_seed(args.seed)
        self.vae = build_autoencoder(args)
        reconstruction = Reconstruction(self.vae, args.latent_noise, self.wrap().sample_moments)
        self.perceptual = None
        if args.perceptual_weight:
            self.perceptual = PerceptualLoss(args.perceptual_weights).to(self.accelerator.device)
        self.model, self.optimizer, self.lr_scheduler = self.prepare(reconstruction, (0.9, 0.95))
        self.reconstruction = self.accelerator.unwrap_model(self.model)
        self.trained = list(self.vae.parameters())
        self.ema = EMAModel(self.trained, decay=args.ema_decay, use_ema_warmup=True, power=0.75)
        self.progress = self.start_progress(fingerprint_pictures(self.dataset, args.train_data_dir))
        self.discriminator = None
        if args.discriminator_start is not None:
            # Patches of small pictures are seen by fewer layers.
            num_layers = max(1, min(3, int(math.log2(args.resolution)) - 3))
            self.discriminator, self.discriminator_optimizer, self.discriminator_scheduler = self.prepare(
                PatchDiscriminator(args.image_channels, num_layers=num_layers), (0.5, 0.9), args.discriminator_start
            )
        self.register(self.ema, self.progress)

    def wrap(
        self, scaling_factor: float | list[float] = 1.0, shift_factor: float | list[float] = 0.0
    ) -> ImageTokenizer:
        """The autoencoder as the tokenizer of the settings; its weights are shared.

        Args:
            scaling_factor (`float` or `list[float]`, *optional*, defaults to 1.0): of all channels or of each.
            shift_factor (`float` or `list[float]`, *optional*, defaults to 0.0): likewise.

        Returns:
            `ImageTokenizer`.
        """
        args = self.args
        statistics = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
        kind = {"patch_size": args.patch_size, "normalizer": args.normalizer, "quantize": args.quantize}
        return ImageTokenizer.from_autoencoder(self.vae, **statistics, **kind)

    def prepare(
        self, model: torch.nn.Module, betas: tuple[float, float], start: int = 0
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """A model, its optimizer and its schedule from a step on, ready for all processes and for checkpoints.

        Args:
            model (`torch.nn.Module`): what is trained.
            betas (`tuple[float, float]`): of AdamW.
            start (`int`, *optional*, defaults to 0): step from which it is trained.

        Returns:
            `tuple`: the three.
        """
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.args.learning_rate, betas=betas, weight_decay=0.0)
        scheduler = self.cosine_schedule(optimizer, start)
        return *self.accelerator.prepare(model, optimizer), scheduler

    def judge(self, restored: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """The generator's adversarial term, scaled to the gradient of all others at the decoder's last layer.

        Args:
            restored (`torch.Tensor` of shape `(batch, channels, height, width)`): reconstructions.
            loss (`torch.Tensor` of shape `()`): all other terms.

        Returns:
            `torch.Tensor` of shape `()`.
        """
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
        """One optimizer step from as many batches as are accumulated.

        Args:
            batches (`Sequence[dict[str, torch.Tensor]]`): pictures with their positions.

        Returns:
            `dict[str, torch.Tensor]`: its losses, means over the batches.
        """
        accelerator = self.accelerator
        adversarial = self.discriminator is not None and self.progress.step >= self.args.discriminator_start
        models = [self.model, *([self.discriminator] if adversarial else [])]
        rows: list[dict[str, torch.Tensor]] = []
        quantised: list[tuple[torch.Tensor, torch.Tensor]] = []
        for batch in batches:
            with accelerator.accumulate(*models):
                row, codes = self.learn(batch, adversarial)
            rows.append({name: value.detach() for name, value in row.items()})
            quantised += codes
        if not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        if adversarial:
            self.discriminator_scheduler.step()
        self.ema.step(self.trained)
        result = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
        if quantised:
            result |= self.watch_codes(*map(torch.cat, zip(*quantised, strict=True)))
        self.advance(len(batches))
        return result

    def learn(
        self, batch: dict[str, torch.Tensor], adversarial: bool
    ) -> tuple[dict[str, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Gradients of a batch, and the optimizers' steps where it completes one.

        Args:
            batch (`dict[str, torch.Tensor]`): pictures with their positions.
            adversarial (`bool`): whether the discriminator takes part.

        Returns:
            `dict[str, torch.Tensor]`, the losses, and a list with the latents and their codes, of a codebook only.
        """
        accelerator, args = self.accelerator, self.args
        pictures = batch["pixel_values"].to(accelerator.device, non_blocking=True)
        generators = example_generators(args.seed, batch["position"], accelerator.device)
        restored, regulariser, latents, codes = self.model(pictures, generators)
        error = restored - pictures
        row = {"reconstruction_loss": error.abs().mean() + error.square().mean()}
        name, weight = ("kl", args.kl_weight) if codes is None else ("commitment_loss", 1.0)
        row[name] = regulariser
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
        return row, [] if codes is None else [(latents, codes)]

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
        """An optimizer's step, where this batch completes one.

        Args:
            model (`torch.nn.Module`): whose gradients are clipped.
            optimizer (`torch.optim.Optimizer`): of the model.
            loss (`torch.Tensor` of shape `()`): of the batch.

        Returns:
            `torch.Tensor` of shape `()`: see `finite_loss`.
        """
        if self.accelerator.sync_gradients:
            loss = self.finite_loss(loss, self.accelerator.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def flush(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        result: dict[str, float] = {"step": self.progress.step, "learning_rate": self.lr_scheduler.get_last_lr()[0]}
        for name in dict.fromkeys(name for row in rows for name in row):
            # Some begin in between.
            values = torch.stack([row[name] for row in rows if name in row])
            values = self.accelerator.reduce(values, "mean")
            self.check_finite(name, values)
            result[name] = values.mean().item()
        self.progress.history.append(result)
        return result

    @contextmanager
    def averaged(self) -> Iterator[Autoencoder]:
        """The autoencoder, for this while with its averaged weights.

        Yields:
            `Autoencoder`: in eval mode.
        """
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        try:
            yield self.vae.eval()
        finally:
            self.ema.restore(self.trained)
            self.vae.train()

    @torch.no_grad()
    def measure(self, tokenizer: ImageTokenizer) -> tuple[float, int, Image.Image]:
        """How well pictures come back: held-out ones, or those of the training where there are no others.

        Args:
            tokenizer (`ImageTokenizer`): what is measured.

        Returns:
            `tuple[float, int, PIL.Image.Image]`: the mean PSNR, over how many pictures, and a grid of some of them.
        """
        batches = some_pictures(self.held_out or self.dataset, self.args.train_batch_size)
        restored = [tokenizer(batch.to(tokenizer.device)).clamp(-1, 1).cpu() for batch in batches]
        # Peak-to-peak is 2 in [-1, 1].
        errors = torch.cat([(a - b).square().mean((1, 2, 3)) for a, b in zip(batches, restored, strict=True)])
        psnr = (10 * torch.log10(4 / errors.clamp(min=1e-10))).mean().item()
        pictures = VaeImageProcessor().postprocess(torch.cat([batches[0][:16], restored[0][:16]]))
        pictures = [on_white(picture) for picture in pictures]
        return psnr, len(errors), make_image_grid(pictures, rows=2, cols=len(pictures) // 2, resize=96)

    @torch.no_grad()
    def measure_codes(self) -> str:
        """How many codes the pictures of `measure` use.

        Returns:
            `str`: in words, for `summary`.
        """
        counts = torch.zeros_like(self.reconstruction.usage)
        for batch in some_pictures(self.held_out or self.dataset, self.args.train_batch_size):
            codes = self.vae.quantize(self.vae.encode(batch.to(counts.device)).latents)[2][2]
            counts += codes.bincount(minlength=len(counts))
        return f", {(counts > 0).sum()} of {len(counts)} codes in use, perplexity {perplexity(counts):.1f},"

    def validate(self) -> None:
        if self.accelerator.is_main_process:
            with self.averaged():
                psnr, _, grid = self.measure(self.wrap())
            self.progress.history[-1]["psnr"] = psnr
            write_samples(grid, self.args.output_dir, self.progress.step)
            write_curves(self.progress.history, self.args.output_dir)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        args = self.args
        with self.averaged() as vae:
            tokenizer = self.wrap()
            if tokenizer.projection is None:  # the others leave unit-scaled tokens, as the decoder was trained on
                mean, std = latent_statistics(tokenizer, some_pictures(self.dataset, args.train_batch_size))
                tokenizer = self.wrap([1 / s for s in std], mean)
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
        self.summary = f"PSNR {psnr:.2f} dB{usage} over {count} {kind} pictures; tokenizer in {args.output_dir}"

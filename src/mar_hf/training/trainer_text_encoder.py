# SPDX-License-Identifier: Apache-2.0
"""The training of text encoders."""

import itertools
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from ..utils import atomic_folder
from .arguments import TextEncoderTrainingArguments
from .batches import example_generators
from .curves import write_curves
from .resuming import fingerprint
from .text_data import caption_choices, read_captions
from .text_tokenizer import check_tokenizer, make_tokenizer, train_sentencepiece
from .trainer_base import BaseTrainer


class CaptionedPictures(Dataset):
    """Of each picture the texts that may be read, and its captions.

    Args:
        choices (`Sequence[list[str]]`): captions in their templates.
        captions (`Sequence[list[str]]`): the captions themselves.
    """

    def __init__(self, choices: Sequence[list[str]], captions: Sequence[list[str]]):
        self.choices = choices
        self.captions = captions

    def __len__(self) -> int:
        return len(self.choices)

    def __getitems__(self, indices: list[int]) -> list[dict[str, list[str]]]:
        return [{"choices": self.choices[index], "captions": self.captions[index]} for index in indices]


class CaptionCollator:
    """One text of each picture, with pieces left out, and as `labels` one of its captions, whole.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of both.
        token_dropout (`float`): share of the pieces that are left out.
        seed (`int`): of the run.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, token_dropout: float, seed: int):
        self.tokenizer = tokenizer
        self.token_dropout = token_dropout
        self.seed = seed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        generators = example_generators(self.seed, [row["position"] for row in rows])
        texts, captions = (
            [
                row[name][int(torch.randint(len(row[name]), (), generator=g))]
                for row, g in zip(rows, generators, strict=True)
            ]
            for name in ("choices", "captions")
        )
        kept = []
        for pieces, generator in zip(self.tokenizer(texts).input_ids, generators, strict=True):
            stays = torch.rand(len(pieces), generator=generator) >= self.token_dropout
            end = self.tokenizer.eos_token_id
            kept.append([piece for piece, stay in zip(pieces, stays.tolist(), strict=True) if stay or piece == end])
        batch = self.tokenizer.pad({"input_ids": kept}, return_tensors="pt")
        labels = self.tokenizer(captions, padding=True, return_tensors="pt").input_ids
        return {**batch, "labels": labels.masked_fill(labels == self.tokenizer.pad_token_id, -100)}


def build_text_model(args: TextEncoderTrainingArguments, vocab_size: int) -> T5ForConditionalGeneration:
    """The model of the settings, with random weights.

    Args:
        args (`TextEncoderTrainingArguments`): for the sizes.
        vocab_size (`int`): pieces.

    Returns:
        `T5ForConditionalGeneration`: the decoder has a single layer, so that the work is the encoder's.
    """
    config = T5Config(
        vocab_size=vocab_size,
        d_model=args.hidden_size,
        d_kv=args.hidden_size // args.num_attention_heads,
        d_ff=2 * args.hidden_size,
        num_layers=args.num_layers,
        num_decoder_layers=1,
        num_heads=args.num_attention_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=args.dropout,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


class TextEncoderTrainer(BaseTrainer):
    """The training of a small text encoder and its tokenizer from nothing but captions; no weights are downloaded.

    First the tokenizer learns its pieces from the captions (`text_tokenizer`). Then a small T5 (arXiv:1910.10683)
    learns to turn one caption of a picture, some of whose pieces are left out, into any caption of the same picture.
    Captions of one picture share its name, so the encoder's states have to keep every word; they differ in their
    keywords, so the states have to know what the words stand for. Where each picture has one caption it is restored
    from what is left of it, as BART does with deleted tokens (arXiv:1910.13461). This needs no sentinel tokens, as
    T5's own corruption of spans does, and captions are too short for spans. The decoder is not kept.

    `output_dir` then holds `text_encoder/` (a `T5EncoderModel`) and `tokenizer/`, and beside them `loss.csv` and
    `loss.png`.

    Args:
        args (`TextEncoderTrainingArguments`): settings.

    Raises:
        ValueError: if there are no captions, the tokenizer does not do what sentencepiece does, or `output_dir` holds
            something.

    Example:
        >>> TextEncoderTrainer(TextEncoderTrainingArguments(train_data_dir="captions.txt", output_dir="text")).train()
        >>> encoder = T5EncoderModel.from_pretrained("text", subfolder="text_encoder")
    """

    arguments_class = TextEncoderTrainingArguments
    args: TextEncoderTrainingArguments

    def __init__(self, args: TextEncoderTrainingArguments):
        super().__init__(args)
        captions, labels = read_captions(args.train_data_dir, args.caption_column)
        choices = [
            caption_choices(row, args.caption_templates, label) for row, label in zip(captions, labels, strict=True)
        ]
        # Captions are among the texts, or else their pieces might not be.
        self.texts = list(dict.fromkeys(itertools.chain(*choices, *captions)))
        self.tokenizer = self.learn_tokenizer()
        self.dataset = CaptionedPictures(choices, captions)
        self.collate = CaptionCollator(self.tokenizer, args.token_dropout, args.seed)
        set_seed(args.seed)
        model = build_text_model(args, len(self.tokenizer)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
        self.lr_scheduler = self.cosine_schedule(optimizer)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.progress = self.start_progress({"captions": fingerprint([captions, labels])})
        self.register(self.progress)
        # Dropout draws from the global state; processes need not drop the same.
        set_seed(args.seed, device_specific=True)

    def check_output_dir(self) -> None:
        super().check_output_dir()
        folder = pathlib.Path(self.args.output_dir)
        if (
            self.args.resume_from_checkpoint is None
            and folder.exists()
            and (folder.is_file() or any(folder.iterdir()))
        ):
            raise ValueError(f"`output_dir` must be a new or an empty folder, but {str(folder)!r} is not.")

    def learn_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the captions, as it is when it was saved and loaded.

        Returns:
            `PreTrainedTokenizerBase`: checked.
        """
        pieces = train_sentencepiece(self.texts, self.args.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            make_tokenizer(pieces).save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        check_tokenizer(tokenizer, pieces, self.texts)
        return tokenizer

    def step(self, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """One optimizer step from as many batches as are accumulated.

        Args:
            batches (`Sequence[dict[str, torch.Tensor]]`): ids, their mask and labels.

        Returns:
            `torch.Tensor` of shape `()`: the loss.
        """
        losses = []
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**{name: value.to(self.accelerator.device) for name, value in batch.items()}).loss
                self.accelerator.backward(loss)
                loss = loss.detach()
                if self.accelerator.sync_gradients:
                    loss = self.finite_loss(loss, self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0))
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss)
        if not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        self.advance(len(batches))
        return torch.stack(losses).mean()

    def flush(self, steps: list[torch.Tensor]) -> dict[str, float]:
        losses = self.accelerator.reduce(torch.stack(steps), "mean")
        self.check_finite("The loss", losses)
        row = {"step": self.progress.step, "loss": losses.mean().item()}
        self.progress.history.append(row)
        return row

    def save(self) -> None:
        model, folder = self.accelerator.unwrap_model(self.model), pathlib.Path(self.args.output_dir)
        encoder = T5EncoderModel(model.config)
        weights = {name: tensor for name, tensor in model.state_dict().items() if name in encoder.state_dict()}
        encoder.load_state_dict(weights)
        with atomic_folder(folder / "tokenizer", overwrite=True) as target:
            self.tokenizer.save_pretrained(target)
        write_curves(self.progress.history, folder)
        # The encoder comes last: where it is, all is.
        with atomic_folder(folder / "text_encoder", overwrite=True) as target:
            encoder.save_pretrained(target)
        self.summary = (
            f"{len(self.tokenizer)} pieces; the ids of all {len(self.texts)} texts are those of sentencepiece\n"
            f"loss {self.progress.history[-1]['loss']:.3f}; {encoder.num_parameters()} parameters in "
            f"{self.args.output_dir}"
        )

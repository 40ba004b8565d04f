# SPDX-License-Identifier: Apache-2.0
"""Train a small text encoder and its tokenizer from nothing but captions; no weights are downloaded.

    python examples/train_text_encoder.py --train_data_dir data/emoji_text --output_dir out/text

First a sentencepiece model (unigram, arXiv:1804.10959; Unicode normalised, capitals as small letters) learns its
pieces from the captions and becomes a T5 tokenizer of transformers. The script checks that the two give the same ids
for every caption.

Then a small T5 (arXiv:1910.10683) learns to turn one caption of a picture, some of whose pieces are left out, into any
caption of the same picture. Captions of one picture share its name, so the encoder's states have to keep every word;
they differ in their keywords, so the states have to know what the words stand for. Where each picture has one caption
it is restored from what is left of it, as BART does with deleted tokens (arXiv:1910.13461). This needs no sentinel
tokens, as T5's own corruption of spans does, and captions are too short for spans. The decoder has a single layer, so
that the work is the encoder's, and is not kept.

`output_dir` then holds `text_encoder/` (a `T5EncoderModel`) and `tokenizer/`, and beside them `loss.csv` and
`loss.png`.
"""

import io
import itertools
import math
import pathlib
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

import sentencepiece
import torch
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from image_data import load_image_dataset
from text_data import caption_choices, check_templates
from tqdm.auto import tqdm
from training_utils import TrainingBatches, make_accelerator, parse_arguments, write_curves
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from mar_hf.utils import atomic_folder


@dataclass
class Arguments:
    """Settings of the text encoder's training."""

    train_data_dir: str = field(metadata={"help": "captioned image folder, or a text file with one caption a line"})
    output_dir: str = field(metadata={"help": "a new folder, for the text encoder and its tokenizer"})
    caption_column: str = field(default="text", metadata={"help": "column of the captions"})
    caption_templates: list[str] = field(
        default_factory=lambda: ["{}"],
        metadata={"help": 'what captions are put into, one at random: "{}" "an emoji of {}" "{label}: {}"'},
    )
    vocab_size: int = field(default=1000, metadata={"help": "pieces at most; few captions give fewer"})

    hidden_size: int = field(default=128, metadata={"help": "width of the encoder's states"})
    num_layers: int = field(default=3, metadata={"help": "layers of the encoder"})
    num_attention_heads: int = field(default=4, metadata={"help": "attention heads"})
    dropout: float = field(default=0.1, metadata={"help": "dropout of the model"})
    token_dropout: float = field(default=0.15, metadata={"help": "share of the pieces read that are left out"})

    train_batch_size: int = field(default=64, metadata={"help": "pictures a step"})
    max_train_steps: int = field(default=2000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak of the cosine schedule"})
    lr_warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    logging_steps: int = field(default=20, metadata={"help": "steps between noted losses"})
    seed: int = field(default=0, metadata={"help": "of everything random"})

    def __post_init__(self) -> None:
        for name in ("num_layers", "train_batch_size", "max_train_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` has to be at least 1, got {getattr(self, name)}.")
        if self.vocab_size < 10:
            raise ValueError(f"`vocab_size` has to be at least 10, got {self.vocab_size}.")
        for name in ("dropout", "token_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` has to lie in [0, 1), got {getattr(self, name)}.")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} has to be a multiple of `num_attention_heads` "
                f"{self.num_attention_heads}."
            )
        check_templates(self.caption_templates)


def read_captions(path: str, column: str) -> tuple[list[list[str]], list[str]]:
    """The captions of every picture, and the name of its class.

    Args:
        path (`str`): a captioned image folder, or a text file, whose lines are one caption each.
        column (`str`): of the captions, in a folder.

    Returns:
        `list[list[str]]`, none of them empty, and `list[str]`, empty where there are no classes.

    Raises:
        ValueError: if there are none.
    """
    if not pathlib.Path(path).is_file():
        dataset = load_image_dataset(path, column)
        if "text" not in dataset.column_names:
            raise ValueError(f"`train_data_dir` {path!r} holds no captions: no column {column!r}.")
        names = dataset.features["label"].names if "label" in dataset.column_names else None
        return dataset["text"][:], [names[label] for label in dataset["label"]] if names else [""] * len(dataset)
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"`train_data_dir` {path!r} is no text file in UTF-8: {error}") from error
    captions = [[line.strip()] for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"`train_data_dir` {path!r} holds no captions.")
    return captions, [""] * len(captions)


def train_sentencepiece(captions: list[str], vocab_size: int) -> bytes:
    """A sentencepiece model whose special pieces are where T5 has them.

    Unigram without byte fallback: transformers reads the other kinds without an error and tokenises otherwise.

    Args:
        captions (`list[str]`): what to learn pieces from; every character in them is known afterwards.
        vocab_size (`int`): pieces at most.

    Returns:
        `bytes`: what sentencepiece would have written as `spiece.model`.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def make_tokenizer(model: bytes) -> T5Tokenizer:
    """The tokenizer of a sentencepiece model, which does not need sentencepiece any more.

    Only a folder that holds nothing but `spiece.model` is read as it should be, normalisation included: T5Tokenizer
    ignores a `vocab_file`. Without `extra_ids=0` it adds a hundred sentinel tokens.

    Args:
        model (`bytes`): see `train_sentencepiece`.

    Returns:
        `T5Tokenizer`: with the model's ids, and the end of the sequence after each text.
    """
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "spiece.model").write_bytes(model)
        return T5Tokenizer.from_pretrained(folder, extra_ids=0)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: bytes, captions: list[str]) -> None:
    """Refuse a tokenizer that does not do what sentencepiece does; all that goes wrong does so silently.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): as it was saved and loaded.
        model (`bytes`): what it was made of.
        captions (`list[str]`): what both tokenise.

    Raises:
        ValueError: if their sizes differ, or their ids; names the first caption.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if len(tokenizer) != processor.get_piece_size():
        raise ValueError(f"The tokenizer has {len(tokenizer)} ids, sentencepiece {processor.get_piece_size()}.")
    for caption in captions:
        ids, expected = tokenizer(caption).input_ids, [*processor.encode(caption), processor.eos_id()]
        if ids != expected:
            raise ValueError(f"The tokenizer makes {ids} of {caption!r}, sentencepiece {expected}.")


def build_model(args: Arguments, vocab_size: int) -> T5ForConditionalGeneration:
    """The model of the settings, with random weights."""
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


def make_batch(
    pictures: Sequence[tuple[list[str], list[str]]],
    tokenizer: PreTrainedTokenizerBase,
    token_dropout: float,
    generator: random.Random,
) -> BatchEncoding:
    """One text of each picture, with pieces left out, and as `labels` one of its captions, whole."""
    texts = tokenizer([generator.choice(choices) for choices, _ in pictures]).input_ids
    kept = [[p for p in text if p == tokenizer.eos_token_id or generator.random() >= token_dropout] for text in texts]
    batch = tokenizer.pad({"input_ids": kept}, return_tensors="pt")
    captions = [generator.choice(captions) for _, captions in pictures]
    labels = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    batch["labels"] = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    return batch


def train(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pictures: Sequence[tuple[list[str], list[str]]],
    args: Arguments,
) -> list[dict[str, float]]:
    """Train a model in place.

    Args:
        model (`T5ForConditionalGeneration`): on its device.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        pictures (`Sequence[tuple[list[str], list[str]]]`): of each what may be read, and its captions.
        args (`Arguments`): settings.

    Returns:
        `list[dict[str, float]]`: rows of `loss.csv`.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    generator, batches = random.Random(args.seed), TrainingBatches(len(pictures), args.train_batch_size, args.seed)
    history, losses = [], []
    bar = tqdm(zip(range(1, args.max_train_steps + 1), batches, strict=False), total=args.max_train_steps)
    for step, batch in bar:
        batch = make_batch([pictures[index] for index, _ in batch], tokenizer, args.token_dropout, generator)
        loss = model(**batch.to(model.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % args.logging_steps == 0 or step == args.max_train_steps:
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise FloatingPointError(f"The loss is {mean} at step {step}. Try a lower learning rate.")
            history.append({"step": step, "loss": mean})
            bar.set_postfix(loss=f"{mean:.4g}")
            losses.clear()
    return history


def main(args: Arguments) -> None:
    """Train both and write the folder."""
    captions, labels = read_captions(args.train_data_dir, args.caption_column)
    choices = [
        caption_choices(row, args.caption_templates, label) for row, label in zip(captions, labels, strict=True)
    ]
    # Captions are among the texts, or else their pieces might not be.
    texts = list(dict.fromkeys(itertools.chain(*choices, *captions)))
    with atomic_folder(args.output_dir) as folder:
        pieces = train_sentencepiece(texts, args.vocab_size)
        make_tokenizer(pieces).save_pretrained(folder / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        check_tokenizer(tokenizer, pieces, texts)
        print(f"{len(tokenizer)} pieces; the ids of all {len(texts)} texts are those of sentencepiece")
        set_seed(args.seed)
        model = build_model(args, len(tokenizer)).to(make_accelerator().device).train()
        history = train(model, tokenizer, list(zip(choices, captions, strict=True)), args)
        encoder = T5EncoderModel(model.config)
        weights = {name: tensor for name, tensor in model.state_dict().items() if name in encoder.state_dict()}
        encoder.load_state_dict(weights)
        encoder.save_pretrained(folder / "text_encoder")
        write_curves(history, folder)
    print(f"loss {history[-1]['loss']:.3f}; {encoder.num_parameters()} parameters in {args.output_dir}")


if __name__ == "__main__":
    main(parse_arguments(Arguments))

# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that learns its pieces from captions.

A sentencepiece model (unigram, arXiv:1804.10959; Unicode normalised, capitals as small letters) becomes a T5 tokenizer
of transformers, and is checked to give the same ids for every caption.
"""

import io
import pathlib
import tempfile

import sentencepiece
from transformers import PreTrainedTokenizerBase, T5Tokenizer


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

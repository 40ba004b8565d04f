# SPDX-License-Identifier: Apache-2.0
"""Text encoders with their tokenizers, small enough for tests: classes of transformers, random weights. Captions."""

import itertools
import json

import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors


WORDS = "a an and big blue cat clock green heart kitten of on red small the two with".split()
# T5 has no limit of its own; CLIP and BERT know as many positions as this.
TEXT_ENCODERS = {"t5": 10**6, "clip": 14, "bert": 9}
TEXT_DIM = 16
# A model that reads texts up to a length that CLIP and BERT do not reach.
TEXT = {"text_dim": TEXT_DIM, "num_text_tokens": 16, "text_aligner_layers": 1}


def tiny_text_tokenizer(kind: str = "t5") -> PreTrainedTokenizerFast:
    """Words for T5, bytes for CLIP, pieces of words for BERT; special tokens and padding as theirs are."""
    if kind == "t5":
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        vocabulary = {token: number for number, token in enumerate([*special.values(), *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer, template = pre_tokenizers.Whitespace(), "$A </s>"
    elif kind == "clip":
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder, template = decoders.ByteLevel(), "<|startoftext|> $A <|endoftext|>"
    else:
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        letters = "abcdefghijklmnopqrstuvwxyz"
        pieces = [*special.values(), *WORDS, *letters, *(f"##{letter}" for letter in letters)]
        vocabulary = {token: number for number, token in enumerate(dict.fromkeys(pieces))}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        template = "[CLS] $A [SEP]"
    own = [(token, vocabulary[token]) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=own)
    limit = TEXT_ENCODERS[kind]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=limit, **special)


def tiny_text_encoder(kind: str = "t5", width: int = TEXT_DIM) -> PreTrainedModel:
    """Two layers of another architecture each, the same every time, in eval mode; states of about unit deviation."""
    size, limit = len(tiny_text_tokenizer(kind)), TEXT_ENCODERS[kind]
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": width, "intermediate_size": 2 * width}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "t5":
            encoder = T5EncoderModel(
                T5Config(vocab_size=size, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
            )
        elif kind == "clip":
            ends = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
            config = CLIPTextConfig(vocab_size=size, max_position_embeddings=limit, **shape, **ends)
            encoder = CLIPTextModel(config)
        else:
            encoder = BertModel(BertConfig(vocab_size=size, max_position_embeddings=limit, **shape))
        for module in encoder.modules():
            if isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight)
    return encoder.eval()


def write_people(folder):
    """Two roles in two genders and three tones, each a colour of its own; two of them held out. Gives the folder."""
    held_out = {("cook", "man", "dark"), ("pilot", "woman", "light")}
    lines = {"train": [json.dumps({"file_name": "x.png", "text": ["a heart"], "role": ""})], "test": []}
    everyone = itertools.product(("cook", "pilot"), ("man", "woman"), ("light", "dark", "medium"))
    for number, (role, gender, tone) in enumerate(everyone):
        split = "test" if (role, gender, tone) in held_out else "train"
        (folder / split).mkdir(exist_ok=True)
        picture = Image.new("RGB", (8, 8), (20 * number, 255 - 20 * number, 7 * number))
        picture.save(folder / split / f"{number}.png")
        row = {"role": role, "gender": gender, "tone": tone, "text": [f"{gender} {role}: {tone}"]}
        lines[split].append(json.dumps({"file_name": f"{number}.png", **row}))
    for split, rows in lines.items():
        (folder / split / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder

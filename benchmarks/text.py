# SPDX-License-Identifier: Apache-2.0
"""Measure what texts add to the time of a picture: the same model with texts and without, in turns.

python benchmarks/text.py                       # MAR-B, texts of 5, 16 and 32 tokens of T5-large's shape
python benchmarks/text.py --model large --device cuda --dtype bfloat16 --output results.jsonl
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
import transformers
from measuring import (
    DTYPES,
    Recorder,
    Stopwatch,
    append_record,
    hardware,
    machine,
    quiet,
    random_pipeline,
    versions,
)
from plans import Plan, integrate, make_plan, scheduled
from transformers import T5Config, T5EncoderModel

from mar_hf import MARConfig, MARPipeline
from mar_hf.generation import TOKEN_SCHEDULES


# Sizes of T5's encoders by the name of the released models.
TEXT_ENCODERS = {
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
}
PARTS = ("text encoder", "aligner, keys and values")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="base", choices=MARConfig.presets, help="size (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="another number of blocks in the encoder and in the decoder")
    parser.add_argument("--text-encoder", default="large", choices=TEXT_ENCODERS, help="T5's (default: %(default)s)")
    parser.add_argument("--text-tokens", type=int, nargs="+", default=[5, 16, 32], help="of a text (default: 5 16 32)")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures in one call (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=64, help="autoregressive steps (default: 64)")
    parser.add_argument("--num-diffusion-steps", type=int, default=100, help="head steps (default: 100)")
    parser.add_argument(
        "--sampled-steps",
        type=int,
        default=4,
        help="autoregressive steps that are measured, the others are interpolated; 0: whole calls (default: 4)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a line of JSON is appended to this file")
    return parser


@torch.no_grad()
def time_call(
    pipe: MARPipeline, encoder: T5EncoderModel | None, text_tokens: int, plan: Plan, args: argparse.Namespace
) -> dict[str, float]:
    """One call: seconds of the generation in all, and of what happens once for texts where there is a text encoder."""
    watch, recorder = Stopwatch(args.device, PARTS), Recorder(args.device)
    call = {"num_diffusion_steps": args.num_diffusion_steps, "num_inference_steps": args.num_inference_steps}
    call |= {"guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    with ExitStack() as stack:
        if not plan.is_whole:
            call |= stack.enter_context(scheduled(plan))
        if encoder is None:
            call["class_labels"] = [0] * args.batch_size
        else:
            stack.enter_context(watch.on(pipe.transformer.model, "read_text", PARTS[1]))
            stack.enter_context(watch.on(encoder, "forward", PARTS[0]))
            ids = torch.arange(text_tokens, device=args.device).expand(args.batch_size, -1)
            call["prompt_embeds"] = encoder(input_ids=ids).last_hidden_state
        with recorder, recorder.on(pipe):
            pipe(**call)
    total = sum(seconds for seconds, _ in integrate(plan, recorder).values()) + watch.seconds[PARTS[0]]
    # Texts are read in the first step, which a plan of some steps does not measure.
    return {**watch.seconds, "total": total + (0 if plan.is_whole else watch.seconds[PARTS[1]])}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time the model without texts and that with texts of each length in turns.

    Args:
        args (`argparse.Namespace`): the command line.

    Returns:
        `dict[str, Any]`: settings and medians in seconds, ready for JSON.
    """
    sizes = TEXT_ENCODERS[args.text_encoder]
    layers = {} if args.layers is None else {"num_encoder_layers": args.layers, "num_decoder_layers": args.layers}
    dtype = DTYPES[args.dtype]
    with torch.device(args.device):
        config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", d_kv=64, **sizes)
        encoder = T5EncoderModel(config).to(dtype).eval()
    without, with_texts = (
        random_pipeline(args.model, args.device, **layers, **settings).to(dtype)
        for settings in ({}, {"text_dim": sizes["d_model"]})
    )
    for pipe in (without, with_texts):
        pipe.set_progress_bar_config(disable=True)
    steps = args.num_inference_steps
    tokens = TOKEN_SCHEDULES["cosine"](without.transformer.config.num_tokens, steps)
    plan = make_plan(tokens, [args.num_diffusion_steps] * steps, args.sampled_steps or None)
    kinds = {0: (without, None), **{length: (with_texts, encoder) for length in args.text_tokens}}
    times: dict[int, list[dict[str, float]]] = {length: [] for length in kinds}
    for repeat in range(args.repeats + 1):
        for length, (pipe, text_encoder) in kinds.items():
            seconds = time_call(pipe, text_encoder, length, plan, args)
            if repeat:  # the first warms up
                times[length].append(seconds)
    base = median(one["total"] for one in times[0])
    texts = []
    for length in args.text_tokens:
        once = {part: median(one[part] for one in times[length]) for part in PARTS}
        # Against the call without texts beside it: what else the machine does meets both.
        added = median(one["total"] - plain["total"] for one, plain in zip(times[length], times[0], strict=True))
        texts.append({"tokens": length, **once, "cross-attention": added - sum(once.values()), "added": added})
    return {
        **{name: getattr(args, name) for name in ("model", "text_encoder", "batch_size", "dtype", "sampled_steps")},
        **{name: getattr(args, name) for name in ("num_inference_steps", "num_diffusion_steps", "repeats")},
        "parameters": [sum(p.numel() for p in pipe.transformer.parameters()) for pipe in (without, with_texts)],
        "seconds": base,
        "texts": texts,
        "calls": {length: [one["total"] for one in kind] for length, kind in times.items()},
        "machine": machine(args.device),
        "versions": versions(diffusers, transformers),
    }


def table(result: dict[str, Any]) -> str:
    """The result for the eye: a Markdown table under one line of settings."""
    parts = [*PARTS, "cross-attention", "added"]
    rows = [
        [f"{text[part]:.3f} s, {text[part] / (result['seconds'] + text['added']):.1%}" for part in parts]
        for text in result["texts"]
    ]
    measured = f"{result['sampled_steps']} of the steps measured, " if result["sampled_steps"] else ""
    return "\n".join(
        [
            f"MAR {result['model']}, batch {result['batch_size']}, {result['num_inference_steps']} x "
            f"{result['num_diffusion_steps']} steps, {measured}{result['dtype']}, T5 {result['text_encoder']}, "
            f"{hardware(result['machine'])}, median of {result['repeats']}: {result['seconds']:.2f} s without texts",
            "",
            f"| tokens of a text | {' | '.join([*PARTS, 'cross-attention', 'in all, of a call with texts'])} |",
            "|---|---|---|---|---|",
            *(f"| {text['tokens']} | {' | '.join(row)} |" for text, row in zip(result["texts"], rows, strict=True)),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, append the record."""
    args = build_parser().parse_args(argv)
    with quiet():
        result = run(args)
    print(table(result))
    append_record(args.output, result)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Measure what texts add to the time of a picture: the same model with texts and without, in turns.

python benchmarks/text.py                                  # MAR-B, a text encoder of T5-large's shape
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
    Stopwatch,
    append_record,
    hardware,
    machine,
    now,
    quiet,
    random_pipeline,
    versions,
)
from transformers import T5Config, T5EncoderModel

from mar_hf import MARConfig, MARPipeline


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
    parser.add_argument("--text-tokens", type=int, default=32, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures in one call (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=64, help="autoregressive steps (default: 64)")
    parser.add_argument("--num-diffusion-steps", type=int, default=100, help="head steps (default: 100)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a line of JSON is appended to this file")
    return parser


@torch.no_grad()
def time_call(pipe: MARPipeline, encoder: T5EncoderModel | None, args: argparse.Namespace) -> dict[str, float]:
    """One call: seconds in all, and of what happens once for texts where there is a text encoder."""
    watch = Stopwatch(args.device, PARTS)
    call = {
        "num_inference_steps": args.num_inference_steps,
        "num_diffusion_steps": args.num_diffusion_steps,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    with ExitStack() as stack:
        start = now(args.device)
        if encoder is None:
            call["class_labels"] = [0] * args.batch_size
        else:
            stack.enter_context(watch.on(pipe.transformer.model, "read_text", PARTS[1]))
            stack.enter_context(watch.on(encoder, "forward", PARTS[0]))
            ids = torch.arange(args.text_tokens, device=args.device).expand(args.batch_size, -1)
            call["prompt_embeds"] = encoder(input_ids=ids).last_hidden_state
        pipe(**call)
        total = now(args.device) - start
    return {**watch.seconds, "total": total}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time both models in turns.

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
    pipes = {
        name: random_pipeline(args.model, args.device, **layers, **settings).to(dtype)
        for name, settings in (("without", {}), ("with", {"text_dim": sizes["d_model"]}))
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in pipes}
    for repeat in range(args.repeats + 1):
        for name, pipe in pipes.items():
            seconds = time_call(pipe, encoder if name == "with" else None, args)
            if repeat:  # the first warms up
                times[name].append(seconds)
    medians = {name: median(one["total"] for one in times[name]) for name in pipes}
    once = {part: median(one[part] for one in times["with"]) for part in PARTS}
    return {
        **{name: getattr(args, name) for name in ("model", "text_encoder", "text_tokens", "batch_size", "dtype")},
        **{name: getattr(args, name) for name in ("num_inference_steps", "num_diffusion_steps", "repeats")},
        "parameters": {name: sum(p.numel() for p in pipe.transformer.parameters()) for name, pipe in pipes.items()},
        "seconds": {"without texts": medians["without"], "with texts": medians["with"], **once},
        "cross-attention": medians["with"] - medians["without"] - sum(once.values()),
        "calls": {name: [one["total"] for one in kind] for name, kind in times.items()},
        "machine": machine(args.device),
        "versions": versions(diffusers, transformers),
    }


def table(result: dict[str, Any]) -> str:
    """The result for the eye: a Markdown table under one line of settings."""
    seconds = result["seconds"]
    rows = {**seconds, "cross-attention (what is left of the difference)": result["cross-attention"]}
    return "\n".join(
        [
            f"MAR {result['model']}, batch {result['batch_size']}, {result['num_inference_steps']} x "
            f"{result['num_diffusion_steps']} steps, {result['dtype']}, texts of {result['text_tokens']} tokens of T5 "
            f"{result['text_encoder']}, {hardware(result['machine'])}, median of {result['repeats']}",
            "",
            "| part | seconds a call | of a call with texts |",
            "|---|---|---|",
            *(f"| {name} | {value:.3f} | {value / seconds['with texts']:.1%} |" for name, value in rows.items()),
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

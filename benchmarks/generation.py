# SPDX-License-Identifier: Apache-2.0
"""Seconds per picture, ours against the plain reference, by part: encoder, decoder, head, autoencoder.

    python benchmarks/generation.py --preset mar-b-cpu --output results.jsonl --plot results.png
    python benchmarks/generation.py --preset gpu

`scenarios.py` holds the presets; the other options change them. `benchmarks/README.md` says what exactly is timed.
"""

import argparse
import copy
import gc
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import plain_reference
import torch
import transformers
from measuring import (
    DTYPES,
    PARTS,
    Memory,
    Recorder,
    append_record,
    compiled_graphs,
    count_kernels,
    load_pipeline,
    machine,
    matmul_rate,
    now,
    quiet,
    versions,
)
from plans import Plan, integrate, make_plan, scheduled
from reports import plot, summary, table
from scenarios import DEFAULTS, GROUPS, SCENARIOS
from transformers import PreTrainedModel

import mar_hf
from mar_hf import MARConfig, MARPipeline, TokenDDPMScheduler
from mar_hf.generation import (
    GUIDANCE_SCHEDULES,
    HEAD_STEP_SCHEDULES,
    TOKEN_SCHEDULES,
    GenerationSettings,
    expand_decoding,
    plan_generation,
)


# Autoregressive steps whose operations are counted where whole calls are timed.
COUNTED_STEPS = 5
# Head steps whose kernels are counted.
COUNTED_HEAD_STEPS = 8
# Settings with which the costs of a step depend on the steps before it, or its head's on more than the number of its
# head steps, unless they have these values.
STEP_BY_STEP = {"guidance_interval": (0.0, 1.0), "guidance_refresh": 1, "detail_share": 0.0}
# Settings that the plain reference does not have, likewise.
OURS_ONLY = {**STEP_BY_STEP, "context_noise": 0.0, "head_kwargs": None}
SETTINGS = ("num_inference_steps", "num_diffusion_steps", "guidance_scale")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        default="demo-cpu",
        choices=[*SCENARIOS, *GROUPS],
        metavar="NAME",
        help=f"{', '.join(SCENARIOS)}; several at once: {', '.join(GROUPS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        help=f"{', '.join(MARConfig.presets)} (random weights, 256 x 256), demo, or a pipeline's folder",
    )
    parser.add_argument("--batch-size", type=int, help="pictures in one call")
    parser.add_argument("--num-inference-steps", type=int, help="autoregressive steps")
    parser.add_argument("--num-diffusion-steps", type=int, help="head steps")
    parser.add_argument("--guidance-scale", type=float, help="1.0 switches guidance off")
    parser.add_argument(
        "--ours", type=json.loads, metavar="JSON", help="arguments of the pipeline's call that only ours gets"
    )
    parser.add_argument(
        "--compile", type=json.loads, metavar="JSON", help="arguments of our pipeline's `compile`; {} for none"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of our weights")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, help="pairs of calls, in turns")
    parser.add_argument(
        "--sampled-steps",
        type=int,
        help="autoregressive steps that are measured, the others are interpolated; 0: whole calls",
    )
    parser.add_argument("--no-reference", action="store_true", help="measure ours alone")
    parser.add_argument("--matmul-size", type=int, help="of the product that shows the machine's rate")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a line of JSON is appended for each preset")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="bars of the parts (needs matplotlib)")
    return parser


def chosen_scenarios(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The preset's scenarios, changed by the other options.

    Args:
        args (`argparse.Namespace`): the command line.

    Returns:
        `dict[str, dict[str, Any]]`: complete scenarios by name.

    Raises:
        ValueError: if a number is below what makes sense.
    """
    for name, least in (("batch_size", 1), ("repeats", 1), ("sampled_steps", 0), ("matmul_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"`--{name.replace('_', '-')}` has to be at least {least}, got {value}.")
    names = ("model", "batch_size", "dtype", "device", "repeats", "ours", "compile")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.model not in (None, *MARConfig.presets):
        changes["model_settings"] = {}
    if args.sampled_steps is not None:
        changes["sampled_steps"] = args.sampled_steps or None
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    scenarios = {}
    for name in GROUPS.get(args.preset, [args.preset]):
        scenario = {**DEFAULTS, **SCENARIOS[name], **changes}
        scenarios[name] = {**scenario, "settings": {**scenario["settings"], **settings}}
    return scenarios


class Side:
    """One of the two that are compared: a pipeline with its settings.

    Args:
        pipe ([`MARPipeline`]): the pipeline.
        scenario (`dict[str, Any]`): of the scenario.
        settings (`dict[str, Any]`): arguments of the pipeline's call.
    """

    def __init__(self, pipe: MARPipeline, scenario: dict[str, Any], settings: dict[str, Any]):
        self.pipe, self.device, self.batch_size = pipe, scenario["device"], scenario["batch_size"]
        self.settings = {**pipe.generation_defaults, **expand_decoding(settings)}
        self.dtype = DTYPES[scenario["dtype"]]
        self.plan, self.counted_plan = (
            self.make_plan(count) for count in (scenario["sampled_steps"], scenario["sampled_steps"] or COUNTED_STEPS)
        )

    def make_plan(self, count: int | None) -> Plan:
        """The generation of the settings, or so many of its autoregressive steps where each is as dear by itself."""
        if self.changed(STEP_BY_STEP):
            count = None
        steps, head_steps = self.settings["num_inference_steps"], self.settings["num_diffusion_steps"]
        tokens = TOKEN_SCHEDULES[self.settings["token_schedule"]](self.pipe.transformer.config.num_tokens, steps)
        return make_plan(tokens, HEAD_STEP_SCHEDULES[self.settings["head_step_schedule"]](head_steps, tokens), count)

    def changed(self, usual: dict[str, Any]) -> list[str]:
        """Names of the settings that do not have their usual values. Lists are what JSON makes of tuples."""
        found = {name: self.settings[name] for name in usual}
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        return [name for name, value in found.items() if value != usual[name]]

    def labels(self) -> list[int] | None:
        """A class for each picture; None where the model knows none."""
        classes = self.pipe.transformer.config.num_classes
        return [number % classes for number in range(self.batch_size)] if classes else None

    def generators(self) -> list[torch.Generator]:
        """Always the same, one a picture."""
        return [torch.Generator().manual_seed(number) for number in range(self.batch_size)]

    def generate(self, plan: Plan, recorder: Recorder | None) -> None:
        """One call: tokens and pictures. A recorder learns what takes how long, and the latents.

        Args:
            plan ([`Plan`]): what to run.
            recorder ([`Recorder`], *optional*): None: the device is not waited for on the way.
        """
        call = {**self.settings, "class_labels": self.labels(), "generator": self.generators(), "output_type": "pt"}
        if call["class_labels"] is None:
            call["num_images_per_prompt"] = self.batch_size
        with ExitStack() as stack:
            if not plan.is_whole:
                call |= stack.enter_context(scheduled(plan))
            if recorder is not None:
                stack.enter_context(recorder.on(self.pipe))
            self.pipe(**call)


class PlainSide(Side):
    """The plain reference of a pipeline in float32, given the orders and the noise that the pipeline draws.

    Args:
        pipe ([`MARPipeline`]): the pipeline.
        scenario (`dict[str, Any]`): of the scenario.
        settings (`dict[str, Any]`): arguments of the pipeline's call.

    Raises:
        ValueError: if the pipeline has no plain form.
    """

    def __init__(self, pipe: MARPipeline, scenario: dict[str, Any], settings: dict[str, Any]):
        plain_reference.check(pipe)
        super().__init__(pipe, scenario, settings)
        for name in self.changed(OURS_ONLY):
            raise ValueError(f"The plain reference knows no `{name}`, got {self.settings[name]!r}; see `--ours`.")
        self.autocast = None if scenario["autocast"] is None else DTYPES[scenario["autocast"]]
        self.dtype = self.autocast or torch.float32
        settings = GenerationSettings(**self.settings)
        drawn = plan_generation(settings, pipe.transformer.config, [], self.generators(), device=self.device)
        self.orders, self.noise = drawn.orders, drawn.noise

    def generate(self, plan: Plan, recorder: Recorder | None) -> None:
        """One call, in the plain form: tokens and pictures. A recorder learns what takes how long, and the latents.

        Args:
            plan ([`Plan`]): what to run.
            recorder ([`Recorder`], *optional*): None: the device is not waited for on the way.
        """
        pipe, recorder = self.pipe, Recorder("cpu") if recorder is None else recorder
        labels = self.labels()
        guidance = GUIDANCE_SCHEDULES[self.settings["guidance_schedule"]]
        autocast = torch.autocast(torch.device(self.device).type, self.autocast) if self.autocast else nullcontext()
        with torch.no_grad(), autocast:
            tokens = plain_reference.generate(
                pipe.transformer,
                pipe.scheduler,
                None if labels is None else torch.tensor(labels, device=self.device),
                self.orders,
                self.noise,
                plan.tokens,
                plan.head_steps,
                guidance(self.settings["guidance_scale"], plan.tokens),
                self.settings["temperature"],
                recorder,
            )
            recorder.latents = pipe.vae.unpatchify(tokens, pipe.transformer.config.grid_height)
            recorder.lap("other")
            image = pipe.vae.decode(recorder.latents).float()
            recorder.lap("vae")
            pipe.image_processor.postprocess(image, output_type="pt")


def with_head(transformer: PreTrainedModel, **head: Any) -> PreTrainedModel:
    """The same backbone, not copied, with another head.

    Args:
        transformer (`PreTrainedModel`): of a pipeline.
        head (`Any`): settings of its configuration.

    Returns:
        `PreTrainedModel`: the head has random weights.
    """
    config = type(transformer.config).from_dict({**transformer.config.to_dict(), **head})
    with torch.device(transformer.device):
        other = type(transformer)(config).to(transformer.dtype).eval()
    other.model = transformer.model
    return other


def build_sides(scenario: dict[str, Any], reference: bool) -> dict[str, Side]:
    """What is measured: `"plain"`, where there is a reference, and `"ours"`.

    Args:
        scenario (`dict[str, Any]`): a complete scenario.
        reference (`bool`): whether there is a reference.

    Returns:
        `dict[str, Side]`: ready to generate.
    """
    pipe = load_pipeline(scenario["model"], scenario["device"], **scenario["model_settings"])
    parts, dtype = dict(pipe.components), DTYPES[scenario["dtype"]]
    if dtype != torch.float32:
        for name in ("transformer", "vae"):
            parts[name] = (copy.deepcopy(parts[name]) if reference else parts[name]).to(dtype)
    if scenario["head"] is not None:
        parts["transformer"] = with_head(parts["transformer"], **scenario["head"])
    if scenario["scheduler"] is not None:
        settings = dict(scenario["scheduler"])
        name = settings.pop("class")
        scheduler = getattr(mar_hf, name, None) or getattr(diffusers, name)
        parts["scheduler"] = scheduler.from_config(pipe.scheduler.config, **settings)
    saved = {name: pipe.config[name] for name in ("id2label", "generation_defaults")}
    ours = MARPipeline(**parts, **saved)
    ours.set_progress_bar_config(disable=True)
    if scenario["compile"] is not None:
        ours.compile(**scenario["compile"])
    sides: dict[str, Side] = {"plain": PlainSide(pipe, scenario, scenario["settings"])} if reference else {}
    return {**sides, "ours": Side(ours, scenario, {**scenario["settings"], **scenario["ours"]})}


def warm_up(sides: dict[str, Side], scenario: dict[str, Any]) -> dict[str, float]:
    """What the first call of each side costs where it has more to do than others: compile, or wake up a GPU.

    Args:
        sides (`dict[str, Side]`): what is measured.
        scenario (`dict[str, Any]`): a complete scenario.

    Returns:
        `dict[str, float]`: seconds beyond those of the second call; empty where nothing is expected.
    """
    if scenario["compile"] is None and torch.device(scenario["device"]).type != "cuda":
        return {}
    costs = {}
    for name, side in sides.items():
        marks = [now(side.device)]
        for _ in range(2):
            side.generate(side.plan, None)
            marks.append(now(side.device))
        costs[name] = marks[1] - marks[0] - (marks[2] - marks[1])
    return costs


def kernels_per_head_step(side: Side) -> float | None:
    """Kernels of a head step on a GPU, operators on a CPU: what more head steps add to a call of one step.

    Args:
        side ([`Side`]): one of the two.

    Returns:
        `float`, *optional*: None where all tokens can't be made at once, the settings have a single head step, or its
        costs depend on the steps before.
    """
    num_tokens = side.pipe.transformer.config.num_tokens
    more = min(COUNTED_HEAD_STEPS, side.settings["num_diffusion_steps"] - 1)
    try:
        side.pipe.transformer.check_tokens_per_step([num_tokens])
    except ValueError:
        return None
    if more < 1 or side.changed(STEP_BY_STEP):
        return None
    plans = [Plan([num_tokens], [steps], [(num_tokens, steps)]) for steps in (1, 1 + more)]
    if torch.device(side.device).type == "cuda":
        side.generate(plans[0], None)  # graphs are recorded once
    few, many = (count_kernels(side.device, partial(side.generate, plan, None)) for plan in plans)
    return (many - few) / more


def count_operations(sides: dict[str, Side]) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:
    """Floating-point operations of each side by part, and the latents that they made. It also warms up.

    Args:
        sides (`dict[str, Side]`): what is measured.

    Returns:
        two `dict`: operations of a whole generation, and latents of the steps that were counted, in float32.
    """
    operations, latents = {}, {}
    for name, side in sides.items():
        with Recorder(side.device, count=True) as recorder:
            side.generate(side.counted_plan, recorder)
        operations[name] = {part: done for part, (_, done) in integrate(side.counted_plan, recorder).items()}
        latents[name] = recorder.latents.float()
    return operations, latents


def compare(sides: dict[str, Side], latents: dict[str, torch.Tensor], scenario: dict[str, Any]) -> dict[str, Any]:
    """How far our latents are from the reference's: the largest difference over the largest magnitude.

    Args:
        sides (`dict[str, Side]`): what is measured.
        latents (`dict[str, torch.Tensor]`): what they made of the same noise.
        scenario (`dict[str, Any]`): a complete scenario.

    Returns:
        `dict[str, Any]`: `equal`: whether they have to be; `ours` and, where it is not itself in float32, `plain`:
        differences to the plain reference in float32. Without them, the settings ask for different pictures.

    Raises:
        RuntimeError: if they have to be equal and are not.
    """
    plain, ours = sides["plain"], sides["ours"]
    same_scheduler = dict(plain.pipe.scheduler.config) == dict(ours.pipe.scheduler.config)
    same_head = plain.pipe.transformer.config.head_type == ours.pipe.transformer.config.head_type
    if (
        plain.settings != ours.settings
        or not same_head
        or not (same_scheduler and isinstance(ours.pipe.scheduler, TokenDDPMScheduler))
    ):
        return {"equal": False}
    expected, found = latents["plain"], {"ours": latents["ours"]}
    if plain.autocast:
        found["plain"], precision = latents["plain"], plain.autocast
        plain.autocast, recorder = None, Recorder(plain.device)
        plain.generate(plain.counted_plan, recorder)
        plain.autocast, expected = precision, recorder.latents
    largest = expected.abs().max()
    differences = {name: ((value - expected).abs().max() / largest).item() for name, value in found.items()}
    equal = scenario["dtype"] == "float32" and not plain.autocast
    if equal and not differences["ours"] <= plain_reference.TOLERANCE:
        raise RuntimeError(f"Ours differs from the plain reference: {differences['ours']:.1e} of its largest number.")
    return {"equal": equal, **differences}


def time_in_turns(
    sides: dict[str, Side], scenario: dict[str, Any], rate: Callable[[], None]
) -> dict[str, list[dict[str, Any]]]:
    """Calls of both sides in turns.

    Args:
        sides (`dict[str, Side]`): what is measured.
        scenario (`dict[str, Any]`): a complete scenario.
        rate (`Callable`): called before each pair, untimed.

    Returns:
        `dict[str, list[dict[str, Any]]]`: of each call: seconds in `total` and of each part, and `memory` in MB. With
        `parts_apart` only the first call of a side has parts.
    """
    apart = scenario["parts_apart"] and all(side.plan.is_whole for side in sides.values())
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for repeat in range(scenario["repeats"]):
        rate()
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            call = time_parts(sides[name]) if repeat == 0 or not apart else {}
            calls[name].append({**call, **time_whole(sides[name])} if apart else call)
    return calls


def time_parts(side: Side) -> dict[str, Any]:
    """One call: seconds by part and in all, and memory."""
    with Memory(side.device) as memory, Recorder(side.device) as recorder:
        side.generate(side.plan, recorder)
    seconds = {part: taken for part, (taken, _) in integrate(side.plan, recorder).items()}
    total = sum(seconds.values())
    return {**seconds, "tokens": total - seconds["vae"], "total": total, "memory": memory.megabytes}


def time_whole(side: Side) -> dict[str, Any]:
    """One whole call, looked at from outside: seconds in all, and memory."""
    with Memory(side.device) as memory:
        start = now(side.device)
        side.generate(side.plan, None)
        total = now(side.device) - start
    return {"total": total, "memory": memory.megabytes}


def run(name: str, scenario: dict[str, Any], reference: bool = True, matmul_size: int | None = None) -> dict[str, Any]:
    """Build, compare, measure.

    Args:
        name (`str`): of the scenario.
        scenario (`dict[str, Any]`): a complete scenario.
        reference (`bool`, *optional*, defaults to `True`): whether there is something to compare with.
        matmul_size (`int`, *optional*): see `matmul_rate`; None: what suits the device.

    Returns:
        `dict[str, Any]`: settings and results, ready for JSON.
    """
    device, batch_size, part = scenario["device"], scenario["batch_size"], scenario["part"]
    sides = build_sides(scenario, reference)
    first = warm_up(sides, scenario)
    operations, latents = count_operations(sides)
    difference = compare(sides, latents, scenario) if reference else None
    rates: dict[str, list[float]] = {str(side.dtype).removeprefix("torch."): [] for side in sides.values()}
    size = matmul_size or (8192 if torch.device(device).type == "cuda" else 2048)

    def measure_rate() -> None:
        for dtype, values in rates.items():
            values.append(matmul_rate(device, DTYPES[dtype], size))

    kernels = {side_name: kernels_per_head_step(side) for side_name, side in sides.items()}
    graphs = compiled_graphs()
    calls = time_in_turns(sides, scenario, measure_rate)
    graphs = compiled_graphs() - graphs
    measured = {}
    for side_name, side in sides.items():
        typical = sorted(calls[side_name], key=lambda call: call["total"])[len(calls[side_name]) // 2]
        parts = typical if "head" in typical else calls[side_name][0]
        memory = [call["memory"] for call in calls[side_name]]
        measured[side_name] = {
            "settings": side.settings,
            "scheduler": type(side.pipe.scheduler).__name__,
            "dtype": str(side.dtype).removeprefix("torch."),
            "seconds_per_image": {
                **{key: parts[key] / batch_size for key in (*PARTS, "tokens")},
                "total": typical["total"] / batch_size,
            },
            "seconds_per_call": [call["total"] for call in calls[side_name]],
            "operations_per_image": {key: value / batch_size for key, value in operations[side_name].items()},
            "memory_mb": None if None in memory else median(memory),
            "warm_up": first.get(side_name),
            "kernels_per_head_step": kernels[side_name],
            "whole_calls": side.plan.is_whole,
        }
    ours = sides["ours"]
    pipe, config = ours.pipe, ours.pipe.transformer.config
    stride = pipe.vae.stride
    modules = {"backbone": pipe.transformer.model, "head": pipe.transformer.head, "tokenizer": pipe.vae}
    result = {
        "scenario": name,
        **scenario,
        "parameters": {key: sum(p.numel() for p in value.parameters()) for key, value in modules.items()},
        "image_size": [config.grid_height * stride, config.grid_width * stride],
        "num_tokens": config.num_tokens,
        "sides": measured,
        "difference": difference,
        "recompilations": None if scenario["compile"] is None else graphs,
        "matmul": {dtype: median(values) for dtype, values in rates.items()},
        "matmul_size": size,
        "machine": machine(device),
        "versions": versions(diffusers, transformers),
    }
    if reference:
        pairs = zip(calls["plain"], calls["ours"], strict=True)
        result["ratios"] = [plain[part] / ours[part] for plain, ours in pairs]
        result["ratio"] = median(result["ratios"])
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each scenario, print tables, append records; the last line is the (smallest) ratio."""
    args = build_parser().parse_args(argv)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    results = []
    for name, scenario in chosen_scenarios(args).items():
        try:
            with quiet():
                result = run(name, scenario, not args.no_reference, args.matmul_size)
        except torch.OutOfMemoryError as error:
            print(f"{name}: {str(error).splitlines()[0]}\n", flush=True)
        else:
            print(table(result), end="\n\n", flush=True)
            append_record(args.output, result)
            results.append(result)
        gc.collect()
        if torch.device(scenario["device"]).type == "cuda":
            torch.cuda.empty_cache()
    if args.plot is not None and results:
        plot(results, args.plot)
    if len(results) > 1:
        print(summary(results), end="\n\n")
    if ratios := [result["ratio"] for result in results if "ratio" in result]:
        print(f"ratio {min(ratios):.2f}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Start-up: the time to import the package, and to load each size from safetensors, with its memory.

    python benchmarks/loading.py --preset load-b
    python benchmarks/loading.py --preset load --output results.jsonl

Each is measured in processes of its own. `benchmarks/README.md` says what exactly is timed.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any


# Models of random weights by preset.
PRESETS = {"load-b": ["base"], "load-l": ["large"], "load-h": ["huge"], "load": ["base", "large", "huge"]}
KINDS = ("ours", "plain")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="load-b", choices=PRESETS, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="a saved transformer instead of the preset's")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--only", choices=KINDS, help="load the folder once, and say what it took: such a process")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a line of JSON is appended for each model")
    return parser


def load(folder: Path, kind: str) -> dict[str, float]:
    """Import the package and load a transformer, in this process.

    Args:
        folder (`Path`): a saved transformer.
        kind (`str`): `"ours"`: `from_pretrained`; `"plain"`: build it with random weights, then copy a state dict of
            the file into it.

    Returns:
        `dict[str, float]`: seconds of `import`, of `load` and until all weights are `ready`: read once; `weights_mb`,
        `peak_mb` of the process, and `above_mb`: the most that was held above what was held before, None where the
        system does not tell; `checksum` of the weights.
    """
    start = time.perf_counter()
    import mar_hf

    imported = time.perf_counter() - start
    import torch
    from measuring import Memory, peak_memory

    model_class = mar_hf.MARForImageGeneration
    with Memory("cpu") as memory:
        start = time.perf_counter()
        if kind == "ours":
            model = model_class.from_pretrained(folder)
        else:
            from safetensors.torch import load_file

            model = model_class(mar_hf.MARConfig.from_pretrained(folder))
            state = {}
            for path in sorted(folder.glob("*.safetensors")):
                state |= load_file(path)
            model.load_state_dict(state)
        loaded = time.perf_counter() - start
        # Weights may still be in the file only.
        checksum = sum(parameter.detach().sum(dtype=torch.float64).item() for parameter in model.parameters())
        ready = time.perf_counter() - start
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "import": imported,
        "load": loaded,
        "ready": ready,
        "weights_mb": size / 1e6,
        "peak_mb": peak_memory(),
        "above_mb": memory.megabytes,
        "checksum": checksum,
    }


def run(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Load a folder in turns both ways, each time in a new process, with the files in the cache of the system.

    Args:
        name (`str`): of the model.
        folder (`Path`): a saved transformer.
        repeats (`int`): processes of each kind.

    Returns:
        `dict[str, Any]`: results, ready for JSON; `ratio` is plain / ours, the median over pairs.

    Raises:
        ValueError: if `repeats` is below 1.
        RuntimeError: if a process fails, or the two ways load other numbers.
    """
    if repeats < 1:
        raise ValueError(f"`--repeats` has to be at least 1, got {repeats}.")
    from measuring import machine, measure_alone, versions

    for path in folder.iterdir():
        path.read_bytes()
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for repeat in range(repeats):
        for kind in KINDS[:: 1 if repeat % 2 else -1]:
            found[kind].append(measure_alone(__file__, ["--only", kind, "--folder", str(folder)]))
    sums = [one["checksum"] for values in found.values() for one in values]
    if not math.isclose(min(sums), max(sums), rel_tol=1e-6):
        raise RuntimeError(f"The two ways to load {name} give other weights.")
    ratios = [plain["ready"] / ours["ready"] for plain, ours in zip(found["plain"], found["ours"], strict=True)]
    import safetensors
    import transformers

    return {
        "model": name,
        "loads": found,
        "ratios": ratios,
        "ratio": median(ratios),
        "machine": machine("cpu"),
        "versions": versions(safetensors, transformers),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results for the eye: a Markdown table under one line on the machine."""
    from measuring import hardware

    described = results[0]["machine"]
    lines = [
        f"{hardware(described)}, load {described.get('load')}; medians of processes of their own",
        "",
        "| model | way | import s | load s | load and read s | weights MB | most memory MB | over weights "
        "| of loading MB | over weights |",
        "|---" * 10 + "|",
    ]
    for result in results:
        for kind, loads in result["loads"].items():
            one = {key: median(values) for key in loads[0] if None not in (values := [load[key] for load in loads])}
            weights, above = one["weights_mb"], one.get("above_mb")
            cells = [f"{one['import']:.2f}", f"{one['load']:.3f}", f"{one['ready']:.3f}", f"{weights:,.0f}"]
            cells += [f"{one['peak_mb']:,.0f}", f"{one['peak_mb'] / weights:.2f}"]
            cells += ["", ""] if above is None else [f"{above:,.0f}", f"{above / weights:.2f}"]
            lines.append(f"| {result['model']} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, append the records; the last line is the (smallest) ratio."""
    args = build_parser().parse_args(argv)
    if args.only is not None:
        print(json.dumps(load(args.folder, args.only)))
        return
    import transformers
    from measuring import append_record, random_pipeline

    transformers.utils.logging.disable_progress_bar()
    results = []
    for name in PRESETS[args.preset] if args.folder is None else [args.folder.name]:
        with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
            if args.folder is None:
                random_pipeline(name, "cpu").transformer.save_pretrained(folder)
            results.append(run(name, Path(folder), args.repeats))
        append_record(args.output, results[-1])
    print(table(results))
    print(f"\nratio {min(result['ratio'] for result in results):.2f}")


if __name__ == "__main__":
    main()

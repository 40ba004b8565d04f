# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: models with random weights, clocks, counters, memory, records."""

import ctypes
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.autograd import DeviceType
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import mar_hf
from mar_hf import ImageTokenizer, MARConfig, MARForImageGeneration, MARPipeline, TokenDDPMScheduler
from mar_hf.evaluation import describe_machine


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("encoder", "decoder", "head", "vae", "other")
# Operators that make tensors or views and no numbers.
NO_COMPUTATION = {
    *("aten::as_strided", "aten::view", "aten::alias", "aten::detach", "aten::empty", "aten::empty_strided"),
    *("aten::resolve_conj", "aten::resolve_neg", "aten::is_nonzero", "aten::item", "aten::_local_scalar_dense"),
}
# Sides of the square matrices whose product is the machine's rate.
SLOW_RATE = 5e9  # operations a second: below it large products are not waited for
MATMUL_SIZE = 2048
# The autoencoder of the released models: 16 channels at a 16th of the sides.
KL16 = {
    "block_out_channels": (128, 128, 256, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 256,
}


@torch.no_grad()
def random_pipeline(preset: str, device: str, **settings: Any) -> MARPipeline:
    """A released size with random weights: the arithmetic of the real model, pictures of nothing.

    Args:
        preset (`str`): a name in `MARConfig.presets`.
        device (`str`): where to make it.
        settings (`Any`): of the configuration, where they are not the preset's.

    Returns:
        [`MARPipeline`]: with an autoencoder shaped like the released one.
    """
    with torch.device(device):
        transformer = MARForImageGeneration(MARConfig.preset(preset, **settings)).eval()
        vae = ImageTokenizer.from_autoencoder(AutoencoderKL(**KL16).eval(), scaling_factor=0.2325)
    # A new head is zero where it would act: multiplying zeros takes less power than real weights do, hence less time.
    for parameter in transformer.head.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return MARPipeline(transformer=transformer, vae=vae, scheduler=TokenDDPMScheduler(max_timestep=999))


def load_pipeline(model: str, device: str, **settings: Any) -> MARPipeline:
    """A pipeline in float32, quiet, on the device.

    Args:
        model (`str`): a name in `MARConfig.presets`, `"demo"`, or a pipeline's folder.
        device (`str`): where it goes.
        settings (`Any`): of the configuration, for the presets.

    Returns:
        [`MARPipeline`]: presets have random weights.
    """
    if model in MARConfig.presets:
        pipe = random_pipeline(model, device, **settings)
    else:
        pipe = MARPipeline.from_pretrained(mar_hf.demo_checkpoint() if model == "demo" else model)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of the pipeline: random weights make the sampler run away."""
    logger = logging.getLogger("mar_hf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def now(device: str | torch.device) -> float:
    """Seconds on a clock, when everything asked of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Seconds spent inside chosen methods of chosen objects.

    Args:
        device (`str`): where they compute; a CUDA device is waited for before the clock is read.
        parts (`Sequence[str]`): names to count under.
    """

    def __init__(self, device: str, parts: Sequence[str]):
        self.device = torch.device(device)
        self.seconds = dict.fromkeys(parts, 0.0)

    @contextmanager
    def on(self, owner: Any, method: str, part: str) -> Iterator[None]:
        """Count the calls of a method as one of the parts.

        Args:
            owner (`Any`): the object; its class stays as it is.
            method (`str`): the method's name.
            part (`str`): where its time goes.
        """
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now(self.device)
            result = call(*args, **kwargs)
            self.seconds[part] += now(self.device) - start
            return result

        setattr(owner, method, timed)
        try:
            yield
        finally:
            delattr(owner, method)


class Recorder:
    """Seconds and floating-point operations of a generation: of each autoregressive step and of the rest of the call.

    It is told when something ends, so that the parts add up to the whole.

    Args:
        device (`str`): where the model computes; a CUDA device is waited for before the clock is read.
        count (`bool`, *optional*, defaults to `False`): count operations too, which takes time.
        clock (`Callable`, *optional*, defaults to `now`): seconds, given the device.
    """

    def __init__(self, device: str, count: bool = False, clock: Callable[[torch.device], float] = now):
        self.device, self.clock = torch.device(device), clock
        self.counter = flop_counter() if count else None
        self.steps: list[dict[str, list[float]]] = []
        self.call = _no_parts()
        self.latents: torch.Tensor | None = None
        self._current = self.call
        self._last = self._read()

    def __enter__(self) -> "Recorder":
        if self.counter is not None:
            self.counter.__enter__()
        self._last = self._read()
        return self

    def __exit__(self, *error: Any) -> None:
        self.lap("other")
        if self.counter is not None:
            self.counter.__exit__(*error)

    def _read(self) -> tuple[float, float]:
        return self.clock(self.device), 0.0 if self.counter is None else self.counter.get_total_flops()

    def lap(self, part: str) -> None:
        """What was done since the last lap was this part."""
        read = self._read()
        for index in range(2):
            self._current[part][index] += read[index] - self._last[index]
        self._last = read

    def step(self) -> None:
        """An autoregressive step begins here."""
        self.lap("other")
        self._current = _no_parts()
        self.steps.append(self._current)

    def end_steps(self) -> None:
        """The last autoregressive step is over."""
        self.lap("other")
        self._current = self.call

    @contextmanager
    def on(self, pipe: MARPipeline) -> Iterator[None]:
        """Record a call of a pipeline: by hooks, since modules with a `forward` of their own may be run otherwise.

        Args:
            pipe ([`MARPipeline`]): of any backbone; where it has no encoder, everything is the decoder's.
        """
        model, vae, kind = pipe.transformer.model, pipe.vae, type(pipe.transformer.head)
        draw, decode = kind.draw, vae.decode

        def timed_draw(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.lap("other")
            tokens = draw(*args, **kwargs)
            self.lap("head")
            return tokens

        def timed_decode(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.end_steps()
            self.latents = args[0]
            pixels = decode(*args, **kwargs)
            self.lap("vae")
            return pixels

        with ExitStack() as stack:
            handles = [
                model.register_forward_pre_hook(lambda *_: self.step()),
                model.register_forward_hook(lambda *_: self.lap("decoder")),
            ]
            if hasattr(model, "decoder_proj"):
                handles.append(model.decoder_proj.register_forward_pre_hook(lambda *_: self.lap("encoder")))
            for handle in handles:
                stack.callback(handle.remove)
            # On the class: a call may run on a view of the head.
            kind.draw, vae.decode = timed_draw, timed_decode
            stack.callback(setattr, kind, "draw", draw)
            stack.callback(delattr, vae, "decode")
            yield


def _no_parts() -> dict[str, list[float]]:
    return {part: [0.0, 0.0] for part in PARTS}


def flop_counter() -> FlopCounterMode:
    """torch's counter of floating-point operations, which also knows what it leaves out on CPUs.

    Returns:
        `FlopCounterMode`: counts matrix products, convolutions and attention: what the dispatcher sees inside of it.
    """

    def linear(inputs: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
        return 2 * prod(inputs) * out_shape[-1]

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(*shapes: Any, **_: Any) -> int:
        return sdpa_backward_flop_count(*shapes[:4])

    aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    if hasattr(mkldnn, "_linear_pointwise"):
        formulas[mkldnn._linear_pointwise] = linear
    return FlopCounterMode(display=False, custom_mapping=formulas)


def count_kernels(device: str, call: Callable[[], None]) -> int:
    """Kernels and copies that a GPU runs in a call; on a CPU, operators that compute and call no others.

    Args:
        device (`str`): where.
        call (`Callable`): what to look at.

    Returns:
        `int`.
    """
    on_gpu = torch.device(device).type == "cuda"
    with profile(use_device="cuda" if on_gpu else None, use_kineto=on_gpu) as profiled:
        call()
        now(device)
    if on_gpu:
        return sum(event.device_type == DeviceType.CUDA for event in profiled.function_events)
    leaves = [event.name for event in profiled.function_events if not event.cpu_children]
    return sum(name.startswith(("aten::", "mkldnn::")) and name not in NO_COMPUTATION for name in leaves)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far, those of a recompilation too."""
    from torch._dynamo.utils import counters  # takes longer to import than all else here

    return counters["stats"]["unique_graphs"]


def matmul_rate(device: str, dtype: torch.dtype, size: int = MATMUL_SIZE, repeats: int = 3) -> float:
    """Floating-point operations a second of a product of two square matrices, the median of a few.

    Args:
        device (`str`): where.
        dtype (`torch.dtype`): of the matrices.
        size (`int`, *optional*, defaults to 2048): of the matrices; an eighth of it where products take minutes,
            as in half precision on processors without instructions for it.
        repeats (`int`, *optional*, defaults to 3): timed products after one.

    Returns:
        `float`: operations a second.
    """
    for side in (size // 8, size):
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        seconds = []
        for _ in range(repeats + 1):
            start = now(device)
            matrix @ matrix
            seconds.append(now(device) - start)
        rate = 2 * side**3 / median(seconds[1:])
        if rate < SLOW_RATE:
            break
    return rate


class Memory:
    """Most megabytes (10^6 bytes) that were held inside a `with`, above those held before it, as `megabytes`.

    On a CPU they are those of the process, where the system tells (Linux); else None.

    Args:
        device (`str`): whose memory.
    """

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.megabytes: float | None = None

    def __enter__(self) -> "Memory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _reset_peak()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.megabytes = (torch.cuda.max_memory_allocated(self.device) - self._before) / 1e6
        elif self._before is not None:
            self.megabytes = max(0.0, (_status("VmHWM") - self._before) / 1e6)


def _reset_peak() -> int | None:
    """Bytes held now, from where the peak is counted anew; None where that can't be done."""
    try:
        # What was freed and kept by the allocator would hide what is allocated next.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


def _status(name: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def peak_memory() -> float:
    """Most megabytes (10^6 bytes) of RAM that the process has held since it started, or since the last [`Memory`].

    Not by `resource.getrusage` where the system tells otherwise (Linux): that counts what its parent held, too.
    """
    try:
        return _status("VmHWM") / 1e6
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    described = describe_machine(device) | {"system": f"{platform.system()} {platform.machine()}"}
    if hasattr(os, "getloadavg"):
        described["load"] = round(os.getloadavg()[0], 2)
    return described


def hardware(described: dict[str, Any]) -> str:
    """What `machine` returned, in a few words."""
    return described.get("gpu") or f"{described['cpu']}, {described['threads']} threads"


def versions(*libraries: ModuleType) -> dict[str, str]:
    """Versions of Python, of the package and of libraries, by name."""
    return {
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, *libraries, mar_hf)},
    }


def measure_alone(script: str, words: Sequence[str]) -> dict[str, Any]:
    """What a script measures in a process of its own.

    Args:
        script (`str`): its file.
        words (`Sequence[str]`): its options; it prints one line of JSON, the last.

    Returns:
        `dict[str, Any]`: that line.

    Raises:
        RuntimeError: if it fails; with the end of what it said.
    """
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def append_record(path: Path | None, result: dict[str, Any]) -> None:
    """Append a result to a file as a line of JSON; None: no file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")

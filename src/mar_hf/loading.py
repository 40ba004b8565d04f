# SPDX-License-Identifier: Apache-2.0
"""Loading that refuses broken checkpoints instead of filling gaps with random numbers.

What a checkpoint claims is compared with what its files hold before anything is allocated: `check_checkpoint` reads
`config.json` and the headers of the weight files, and builds the model without memory. What was loaded is finite.
"""

import json
import os
import re
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    is_peft_available,
)


# What says where files of the hub come from, and goes to everything that asks for one.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# How safetensors writes types. What is not here (packed types of quantisers) is read as bytes.
DTYPES = {
    **{f"F{8 * dtype.itemsize}": dtype for dtype in (torch.float64, torch.float32, torch.float16)},
    **{"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{f"I{8 * dtype.itemsize}": dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.int8)},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}
# Settings that say how many modules there are: each holds a tensor at least, and building one takes a millisecond.
COUNTS = re.compile(r"(layers?|blocks?|depth)$")
ALWAYS_BUILT = 64
# A model may be larger than its files by as much: numbers are packed, tensors shared, some made when it is loaded.
PACKED, SMALL = 4, 2**22
# Weights that transformers would prefer to all others: shards of a distributed run.
DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-.*")
# What goes wrong inside of configurations and constructors that are given nonsense. A RuntimeError says so only where
# nothing is allocated: else it may be the memory that is full.
NONSENSE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, StrictDataclassError)


class NotJSONError(OSError, ValueError):
    """A file that should hold JSON; transformers raises an OSError there."""


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path (`str` or `os.PathLike`): the file.

    Returns:
        `dict[str, Any]`: its content.

    Raises:
        ValueError: if it is no JSON, or holds something else; names the file.
        OSError: if it can't be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise NotJSONError(f"{path} is not a valid JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} has to hold a JSON object, got {str(content)[:60]}.")
    return content


def find_file(source: str | os.PathLike, name: str, **hub: Any) -> str | None:
    """One file of a checkpoint.

    Args:
        source (`str` or `os.PathLike`): a folder or a hub id.
        name (`str`): the file's name.
        hub (`Any`): `subfolder`, `revision`, `token`, ...

    Returns:
        `str`: its path, downloaded where `source` is a hub id. None if there is none.

    Raises:
        OSError: if the hub can't be asked.
    """
    if os.path.isdir(source):
        path = os.path.join(source, hub.get("subfolder") or "", name)
        return path if os.path.isfile(path) else None
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)


def _place(source: str | os.PathLike, hub: dict[str, Any]) -> str:
    return str(Path(source, hub.get("subfolder") or ""))


def find_weights(source: str | os.PathLike, variant: str | None = None, **hub: Any) -> list[Path]:
    """The safetensors files of a checkpoint, all in the checkpoint's own folder.

    Args:
        source (`str` or `os.PathLike`): a folder or a hub id.
        variant (`str`, *optional*): of the files' names.
        hub (`Any`): `subfolder`, `revision`, `token`, ...

    Returns:
        `list[Path]`: one file, or the shards that the index names.

    Raises:
        ValueError: if the index is none, or names a file of another folder or format.
        OSError: if a file is missing.
    """
    place = _place(source, hub)
    if os.path.isdir(place) and (found := list(filter(DISTRIBUTED.fullmatch, os.listdir(place)))):
        raise ValueError(f"{place} holds shards of a distributed run ({min(found)}); save the model as a whole.")
    name, index_name = (
        known if variant is None else f".{variant}.".join(known.rsplit(".", 1))
        for known in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if (found := find_file(source, name, **hub)) is not None:
        return [Path(found)]
    if (index := find_file(source, index_name, **hub)) is None:
        pickles = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        pickled = next((pickle for pickle in pickles if find_file(source, pickle, **hub)), None)
        hint = (
            f" {pickled} stands for a pickle, which is loaded with `use_safetensors=False` alone." if pickled else ""
        )
        raise OSError(f"There is no file named {name} in {place}.{hint}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has to hold a `weight_map` from tensors to files, got {str(names)[:60]}.")
    shards = []
    for shard in sorted({str(shard) for shard in names.values()}):
        if shard != re.split(r"[/\\\\]", shard)[-1] or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} has to name safetensors files beside it, got {shard!r}.")
        if (found := find_file(source, shard, **hub)) is None:
            raise OSError(f"{os.path.join(place, shard)} is missing, which {os.path.basename(index)} names.")
        shards.append(Path(found))
    return shards


def read_header(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Shapes and types of the tensors in a safetensors file; nothing else of it is read.

    Args:
        path (`str` or `os.PathLike`): the file.

    Returns:
        `dict[str, torch.Tensor]`: tensors without memory, on the meta device.

    Raises:
        ValueError: if the file is truncated or of another format; names it.
    """
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                form = file.get_slice(name)
                dtype = DTYPES.get(form.get_dtype(), torch.uint8)
                tensors[name] = torch.empty(form.get_shape(), dtype=dtype, device="meta")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    return tensors


def check_counts(settings: dict[str, Any], num_tensors: int, path: str | os.PathLike) -> None:
    """Refuse a configuration of more layers than there are tensors, before they are built.

    Args:
        settings (`dict[str, Any]`): the configuration.
        num_tensors (`int`): tensors in the weight files.
        path (`str` or `os.PathLike`): of the configuration, for the message.

    Raises:
        ValueError: names the file and the setting.
    """
    limit = max(num_tensors, ALWAYS_BUILT)
    for name, value in settings.items():
        if isinstance(value, dict):
            check_counts(value, num_tensors, path)
        numbers = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, (int, float))]
        if COUNTS.search(str(name)) and max(numbers, default=0) > limit:
            raise ValueError(f"{path} has `{name}` {value}, but its weights are {num_tensors} tensors.")


def check_checkpoint(
    cls: type[PreTrainedModel],
    source: str | os.PathLike,
    config: PreTrainedConfig | None = None,
    variant: str | None = None,
    overrides: dict[str, Any] | None = None,
    strict: bool = True,
    **hub: Any,
) -> dict[str, Path]:
    """Compare a model's configuration with the headers of its weight files, before anything is allocated.

    Args:
        cls (`type[PreTrainedModel]`): the model's class, of this package or of transformers.
        source (`str` or `os.PathLike`): a folder or a hub id.
        config (`PreTrainedConfig`, *optional*): instead of the checkpoint's own.
        variant (`str`, *optional*): of the weight files.
        overrides (`dict[str, Any]`, *optional*): settings in place of those of the checkpoint.
        strict (`bool`, *optional*, defaults to `True`): whether the model has to be about as large as its files.
        hub (`Any`): `subfolder`, `revision`, `token`, ...

    Returns:
        `dict[str, Path]`: the file of each tensor.

    Raises:
        ValueError: if a file is broken, elsewhere or no safetensors, weights are no floating-point numbers, or the
            configuration is wrong or asks for far more than the files hold; names file and tensors.
        OSError: if there is no configuration or no weight file.
    """
    place, settings = _place(source, hub), {}
    if config is None:
        # Without this file transformers goes on with the defaults of the configuration.
        if (path := find_file(source, CONFIG_NAME, **hub)) is None:
            raise OSError(f"{os.path.join(place, CONFIG_NAME)} is missing.")
        settings = read_json(path)
    with refusals(place, cls, RuntimeError):
        headers = {file: read_header(file) for file in find_weights(source, variant, **hub)}
        tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
        if config is None:
            check_counts(settings, len(tensors), path)
            config = cls.config_class.from_pretrained(source, **hub, **(overrides or {}))
        if (other := getattr(config, "transformers_weights", None)) is not None:
            raise ValueError(f"its configuration names other weights, `transformers_weights` {other!r}")
        with torch.device("meta"):
            expected = cls(config).state_dict()
        if strict:
            _check_size(expected, tensors, place)
        # Quantisers decide themselves what the tensors are.
        if getattr(config, "quantization_config", None) is None:
            _check_numbers(expected, tensors)
    return {name: file for file, header in headers.items() for name in header}


@contextmanager
def refusals(place: str, cls: type, *more: type[Exception]) -> Iterator[None]:
    """Whatever a configuration or a constructor says of nonsense becomes a ValueError that names the checkpoint.

    Args:
        place (`str`): the checkpoint.
        cls (`type`): what it should be.
        more (`type[Exception]`): errors that are such words here, besides `NONSENSE`.

    Yields:
        None

    Raises:
        ValueError: with the error's own words.
    """
    try:
        yield
    except (*NONSENSE, *more) as error:
        if isinstance(error, OSError) and not isinstance(error, NotJSONError):
            raise
        raise ValueError(f"{place} can't be loaded as {cls.__name__}: {error}") from error


def _check_size(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], place: str) -> None:
    asked, held = (sum(tensor.numel() for tensor in tensors.values()) for tensors in (expected, found))
    if asked > PACKED * held + SMALL:
        name = max(expected, key=lambda name: expected[name].numel())
        raise ValueError(
            f"its {CONFIG_NAME} asks for {asked} numbers, {name} of shape {tuple(expected[name].shape)} among them, "
            f"but the weights in {place} are {held}"
        )


def _check_numbers(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    # By the last part of the name: a checkpoint of a larger model has other first ones.
    weights = {name.split(".")[-1] for name, tensor in expected.items() if tensor.is_floating_point()}
    for name, tensor in found.items():
        if name.split(".")[-1] in weights and not tensor.is_floating_point():
            raise ValueError(f"{name} has to hold floating-point numbers, got {tensor.dtype}")


def check_report(report: dict[str, Any], what: str, cls: type, leftovers: bool = False) -> None:
    """Refuse what transformers only reports: a model with a random layer, or with one layer less.

    Args:
        report (`dict[str, Any]`): its loading report.
        what (`str`): what was loaded, for the message.
        cls (`type`): as what.
        leftovers (`bool`, *optional*, defaults to `False`): whether tensors may have no place, as the decoder of a
            text encoder.

    Raises:
        ValueError: names the tensors.
    """
    problems = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    problems += [f"{key} is {tuple(a)}, not {tuple(b)}" for key, a, b in sorted(report["mismatched_keys"])]
    if not leftovers:
        problems += [f"{name} has no place" for name in sorted(report["unexpected_keys"])]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{what} do not fit {cls.__name__} and its config.json: {shown}.")


def check_finite(model: nn.Module, place: str, files: dict[str, Path] | None = None) -> None:
    """Refuse weights that are not numbers: they make black pictures.

    Args:
        model (`nn.Module`): what was loaded.
        place (`str`): from where.
        files (`dict[str, Path]`, *optional*): the file of each tensor, by its name there.

    Raises:
        ValueError: names the file and the tensor.
    """
    for name, tensor in model.state_dict().items():
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta
        # A sum is the quickest look at all of them (0.2 s for 200 million), and not finite if one is not; types of 8
        # bits have none.
        if not plain or tensor.itemsize == 1 or tensor.sum().isfinite():
            continue
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} in {_file_of(name, files or {}, place)} holds values that are no finite numbers (loaded as "
                f"{tensor.dtype})."
            )


def _file_of(name: str, files: dict[str, Path], place: str) -> Path | str:
    # A checkpoint of a larger or a smaller model has other first parts of the name.
    for key, file in files.items():
        if f".{key}".endswith(f".{name}") or f".{name}".endswith(f".{key}"):
            return file
    return place


def find_base(source: str | os.PathLike, **hub: Any) -> str | os.PathLike:
    """Where the model is to which a checkpoint adds, if it is an adapter's (peft): as transformers looks for it.

    Args:
        source (`str` or `os.PathLike`): a folder or a hub id.
        hub (`Any`): `subfolder`, `revision`, `token`, ...

    Returns:
        `str` or `os.PathLike`: `source` itself where it is a whole model.

    Raises:
        ValueError: if the adapter names no model, or is larger than its weights.
        OSError: if its weights are missing, or a pickle.
    """
    if not is_peft_available() or (path := find_file(source, ADAPTER_CONFIG_NAME, **hub)) is None:
        return source
    if (weights := find_file(source, ADAPTER_SAFE_WEIGHTS_NAME, **hub)) is None:
        raise OSError(f"There is no file named {ADAPTER_SAFE_WEIGHTS_NAME} beside {path}.")
    settings, header = read_json(path), read_header(weights)
    rank, largest = settings.get("r", 0), max((max(form.shape, default=0) for form in header.values()), default=0)
    if not isinstance(rank, int) or rank > largest:
        raise ValueError(f"{path} has `r` {rank!r}, but the largest side of its weights is {largest}.")
    if os.path.isdir(source) and find_file(source, CONFIG_NAME, **hub):
        return source
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{path} has to name its model in `base_model_name_or_path`, got {base!r}: load the model, then give its "
            "`load_adapter` this folder."
        )
    return base


class StrictLoadingMixin:
    """A `from_pretrained` that raises when a checkpoint does not hold exactly the model's tensors.

    transformers only reports missing and unexpected tensors; a picture model with a random layer, or with one layer
    less, still makes pictures, so here they are errors. Put before `PreTrainedModel` in the bases.
    """

    _parameters_without_gradient: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | None,
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        use_safetensors: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model, as `PreTrainedModel.from_pretrained` does, and check that it is whole.

        Args:
            pretrained_model_name_or_path (`str`): a folder or a hub id, of a model or of an adapter (peft); None with
                `config` and `state_dict`.
            model_args (`Any`): passed on.
            output_loading_info (`bool`, *optional*, defaults to `False`): also return transformers' loading report.
            ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): initialise tensors that are missing or
                of another shape, and leave out those that have no place, instead of raising (fine-tuning with another
                number of classes).
            use_safetensors (`bool`, *optional*): False loads a pickle. Else weights are safetensors in the
                checkpoint's own folder.
            kwargs (`Any`): passed on (`dtype`, `device_map`, `subfolder`, `variant`, `revision`, ...).

        Returns:
            the model in eval mode, or the model and the report.

        Raises:
            ValueError: if a weight file is truncated, or tensors are missing, of the wrong shape, left over or not
                finite, or the configuration is wrong; names file and tensors.
            OSError: if there is no configuration or no weight file.
        """
        source, files = pretrained_model_name_or_path, {}
        config = kwargs.get("config")
        if source is None and (config is None or kwargs.get("state_dict") is None):
            raise ValueError(
                "`pretrained_model_name_or_path` has to be given, or `config` and `state_dict`, got None."
            )
        hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "subfolder") if kwargs.get(name) is not None}
        place = "`state_dict`" if source is None else _place(source, hub)
        if source is not None and use_safetensors is not False and kwargs.get("gguf_file") is None:
            use_safetensors = True
            fields = getattr(cls.config_class, "__dataclass_fields__", {}).keys() - {"dtype"}
            files = check_checkpoint(
                cls,
                find_base(source, **hub),
                config if isinstance(config, PreTrainedConfig) else None,
                kwargs.get("variant"),
                {name: value for name, value in kwargs.items() if name in fields},
                # DeepSpeed builds a share of the model on each process.
                strict=not ignore_mismatched_sizes and not is_deepspeed_zero3_enabled(),
                **hub,
            )
            kwargs.pop("force_download", None)
        with refusals(place, cls):
            model, report = super().from_pretrained(
                source,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=use_safetensors,
                **kwargs,
            )
        if not ignore_mismatched_sizes:
            check_report(report, f"The weights in {place}", cls)
        check_finite(model, place, files)
        for name in cls._parameters_without_gradient:
            if (parameter := getattr(model, name, None)) is not None:
                parameter.requires_grad_(False)
        return (model, report) if output_loading_info else model


def slot_types(pipeline: type) -> dict[str, tuple[type, ...]]:
    """The classes of a pipeline's components, as the signature of its constructor has them.

    Args:
        pipeline (`type`): a class of pipelines.

    Returns:
        `dict[str, tuple[type, ...]]`: by slot.
    """
    slots = {}
    for name, hint in typing.get_type_hints(pipeline.__init__).items():
        types = tuple(one for one in typing.get_args(hint) or (hint,) if isinstance(one, type) and one is not NoneType)
        # Components are modules, or come from folders of their own; settings are plain data.
        if types and all(hasattr(one, "from_pretrained") for one in types):
            slots[name] = types
    return slots


def check_component(name: str, found: type, allowed: tuple[type, ...], where: str = "") -> None:
    """Refuse a component of another class than its slot's.

    Args:
        name (`str`): the slot.
        found (`type`): the component's class.
        allowed (`tuple[type, ...]`): the slot's classes.
        where (`str`, *optional*, defaults to `""`): where it is from, for the message.

    Raises:
        ValueError: names the slot, the class and those allowed.
    """
    if issubclass(found, allowed):
        return
    names = " or ".join(one.__name__ for one in allowed)
    wrappers = [one.__name__ for one in allowed if hasattr(one, "from_autoencoder") and hasattr(found, "decode")]
    hint = f" An autoencoder of diffusers is wrapped by `{wrappers[0]}.from_autoencoder`." if wrappers else ""
    raise ValueError(f"`{name}`{where} has to be of class {names}, got {found.__name__}.{hint}")


def check_components(pipeline: type, **components: Any) -> None:
    """Refuse components of other classes than a pipeline's constructor takes; None is left to the constructor.

    Args:
        pipeline (`type`): the pipeline's class.
        components (`Any`): by slot; also compiled, in parallel or with an adapter (peft) around them.

    Raises:
        ValueError: names the slot, the class and those allowed.
    """
    for name, allowed in slot_types(pipeline).items():
        if (component := components.get(name)) is not None:
            if isinstance(component, nn.Module):
                component = extract_model_from_parallel(component, keep_torch_compile=False)
            component = component.get_base_model() if hasattr(component, "get_base_model") else component
            check_component(name, type(component), allowed)


class StrictPipelineMixin:
    """A `from_pretrained` of pipelines that checks `model_index.json` and every part before it loads any.

    diffusers loads whatever class the index names, and transformers only reports what a text encoder lacks. Put before
    `DiffusionPipeline` in the bases.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load a pipeline, as `DiffusionPipeline.from_pretrained` does, from parts that are whole and what they claim.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a hub id.
            kwargs (`Any`): passed on: components in place of those of the checkpoint, `dtype`, `device_map`,
                `variant`, `revision`, ... `use_safetensors=False` loads pickles; else weights are safetensors, each in
                its component's own folder.

        Returns:
            the pipeline.

        Raises:
            ValueError: if the index is broken or names a class that does not fit its slot, or a component is broken or
                not whole; names the file.
            OSError: if a file is missing.
        """
        source = os.fspath(pretrained_model_name_or_path)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        folder = source
        if not os.path.isdir(source):
            try:
                with refusals(source, cls):
                    folder = str(cls.download(source, **kwargs))
            except OSError as error:
                if source in str(error):
                    raise
                raise OSError(f"{source!r} is no folder here, and can't be had from the hub: {error}") from error
        encoders = cls._check_index(Path(folder), kwargs)
        with refusals(source, cls):
            pipeline = super().from_pretrained(folder, **kwargs)
        pipeline.register_to_config(_name_or_path=source)
        for name, place in encoders.items():
            check_finite(getattr(pipeline, name), place)
        return pipeline

    @classmethod
    def _check_index(cls, folder: Path, kwargs: dict[str, Any]) -> dict[str, str]:
        """Check the classes that the index names; gives folders of models that do not check themselves."""
        path, encoders = folder / cls.config_name, {}
        if not path.is_file():
            raise OSError(f"{path} is missing.")
        index = read_json(path)
        if not isinstance(index.get("_class_name"), str):
            raise ValueError(f"{path} has to name a class in `_class_name`, got {index.get('_class_name')!r}.")
        for name, allowed in slot_types(cls).items():
            entry = index.get(name, [None, None])
            if not isinstance(entry, list) or len(entry) != 2 or not {type(one) for one in entry} <= {str, NoneType}:
                raise ValueError(f"{path} has to name library and class of `{name}`, got {entry!r}.")
            if None in entry or name in kwargs:
                continue
            # Only what is there: an index decides neither what is imported nor from where.
            found = getattr(sys.modules.get(entry[0]), entry[1], None)
            if not isinstance(found, type):
                raise ValueError(f"{path} names the unknown class {entry[1]!r} of {entry[0]!r} for `{name}`.")
            check_component(name, found, allowed, f" in {path}")
            part = folder / name if (folder / name).is_dir() else folder
            if (configuration := part / str(getattr(found, "config_name", None))).is_file():
                read_json(configuration)  # diffusers takes a lone text in it for the name of another checkpoint
            if issubclass(found, PreTrainedModel) and not issubclass(found, StrictLoadingMixin):
                encoders[name] = str(part)
                if kwargs["use_safetensors"]:
                    _check_encoder(found, part, kwargs.get("variant"))
        return encoders


def _check_encoder(cls: type[PreTrainedModel], folder: Path, variant: str | None) -> None:
    """What `StrictLoadingMixin` does, for a model of transformers: by a rehearsal without memory."""
    # As diffusers decides: parts without the variant come without.
    variant = variant if variant is not None and any(folder.glob(f"*.{variant}*.safetensors*")) else None
    base = find_base(folder)
    files = check_checkpoint(cls, base, variant=variant)
    config = cls.config_class.from_pretrained(base)
    if getattr(config, "quantization_config", None) is not None:
        return
    tensors = {name: tensor for file in set(files.values()) for name, tensor in read_header(file).items()}
    with refusals(str(folder), cls, RuntimeError):
        _, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_report(report, f"The weights in {folder}", cls, leftovers=True)

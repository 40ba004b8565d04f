# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from which a run goes on exactly: written whole or not at all, and checked before they are used."""

import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import SCALER_NAME, broadcast_object_list

from .resuming import changed_settings, check_data


logger = get_logger(__name__)

MANIFEST = "manifest.json"
# What a run writes under a hidden name first: see `atomic_file` and `atomic_folder`.
LEFT_OVER = re.compile(r"\.(loss\.csv|loss\.png|step_\d+\.png|pipeline|lora|tokenizer|text_encoder)-\w+$")


class Progress:
    """How far a run is: what a checkpoint holds besides the states of models and optimizers.

    Args:
        num_examples (`int`): of the data set; a checkpoint of another number is refused.
        seed (`int`): of the run; likewise.
        settings (`dict`, *optional*): see `remembered_settings`.
        data (`dict`, *optional*): fingerprints of the data, by name; a checkpoint of other data is refused.
    """

    def __init__(
        self,
        num_examples: int,
        seed: int,
        settings: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
    ):
        self.num_examples = num_examples
        self.seed = seed
        self.settings = settings or {}
        self.data = data or {}
        self.step = 0
        self.position = 0
        self.history: list[dict[str, float]] = []
        # (step, setting, its value until then), of settings that were changed when the run was resumed.
        self.changes: list[list[Any]] = []

    def state_dict(self) -> dict[str, str]:
        """Everything, for `torch.save`: as JSON, since pickles of equal objects can differ."""
        return {"json": json.dumps(vars(self))}

    def changed_settings(self, state: dict[str, str]) -> dict[str, tuple[Any, Any]]:
        """What this run sets otherwise than the one of a checkpoint.

        Args:
            state (`dict[str, str]`): what `state_dict` gave.

        Returns:
            `dict[str, tuple]`: name -> (old, new).

        Raises:
            ValueError: if the data is other data, or a setting can't be changed.
        """
        state = json.loads(state["json"])
        changed = changed_settings(state.get("settings", {}), self.settings)
        if state["num_examples"] != self.num_examples:
            raise ValueError(
                f"The checkpoint was trained on {state['num_examples']} examples, the data now has "
                f"{self.num_examples}. Fine-tune its pipeline instead: `pretrained_model_name_or_path`."
            )
        if state["seed"] != self.seed:
            raise ValueError(f"The checkpoint was trained with `seed` {state['seed']}, got {self.seed}.")
        check_data(state.get("data", {}), self.data)
        return changed

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Take over what `state_dict` gave, and note what is set otherwise from here on.

        Args:
            state (`dict[str, str]`): of another object.

        Raises:
            ValueError: see `changed_settings`.
        """
        changed, new = self.changed_settings(state), {"settings": self.settings, "data": self.data}
        vars(self).update(json.loads(state["json"]) | new)
        self.changes += [[self.step, name, old] for name, (old, _) in changed.items()]


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Digest of every file below a folder, by its relative path; the manifest itself is left out.

    Args:
        folder (`pathlib.Path`): an existing folder.

    Returns:
        `dict[str, str]`: BLAKE2b in hexadecimal.
    """
    result = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST:
            continue
        digest = hashlib.blake2b()
        with open(path, "rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        result[name] = digest.hexdigest()
    return result


def list_checkpoints(output_dir: str | os.PathLike) -> list[pathlib.Path]:
    """The `checkpoint-<step>` folders of a run.

    Args:
        output_dir (`str` or `os.PathLike`): of the run; need not exist.

    Returns:
        `list[pathlib.Path]`: the oldest first.
    """
    folders = [path for path in pathlib.Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[11:]))


def check_checkpoint(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint.

    Args:
        folder (`pathlib.Path`): a `checkpoint-<step>`.

    Returns:
        `str`, *optional*: None where every file is as it was written.
    """
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} can't be read ({error})"
    found = digests(folder)
    wrong = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    return f"{', '.join(wrong)} missing, added or changed" if wrong else None


def save_checkpoint(accelerator: Accelerator, output_dir: str | os.PathLike, step: int, total_limit: int) -> None:
    """Write everything that `accelerator` knows as `checkpoint-<step>`, whole or not at all; every process calls this.

    Args:
        accelerator (`Accelerator`): with all models, optimizers and registered objects.
        output_dir (`str` or `os.PathLike`): of the run.
        step (`int`): optimizer steps so far.
        total_limit (`int`): the newest so many stay.

    Raises:
        RuntimeError: if it can't be written, a full disk say; earlier checkpoints are left alone.
    """
    folder = pathlib.Path(output_dir, f"checkpoint-{step}")
    # What is not whole, not yet or not any more, has this name.
    partial = folder.with_name("checkpoint.partial")
    accelerator.wait_for_everyone()
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / MANIFEST).write_text(json.dumps(digests(partial), indent=2), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old.rename(partial))
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = [str(path) for path in list_checkpoints(output_dir)][-1:] or "none"
        raise RuntimeError(
            f"{folder} could not be written ({error}). The last whole checkpoint: {last[0]}."
        ) from error
    accelerator.wait_for_everyone()


def remove_left_overs(output_dir: str | os.PathLike) -> None:
    """Remove what a run that was killed was just writing: hidden holders of files and folders, and a checkpoint.

    Args:
        output_dir (`str` or `os.PathLike`): of the run.
    """
    shutil.rmtree(pathlib.Path(output_dir, "checkpoint.partial"), ignore_errors=True)
    for folder in (pathlib.Path(output_dir), pathlib.Path(output_dir, "samples")):
        for path in folder.glob(".*-*"):
            if LEFT_OVER.match(path.name):
                shutil.rmtree(path)


def load_checkpoint(accelerator: Accelerator, output_dir: str | os.PathLike, name: str) -> pathlib.Path | None:
    """Load the newest whole checkpoint of a run, or a given one; every process calls this.

    Newer ones would be taken for those of the run that goes on: damaged ones are removed, whole ones renamed.

    Args:
        accelerator (`Accelerator`): with the same objects as when it was saved.
        output_dir (`str` or `os.PathLike`): of the run.
        name (`str`): `"latest"`, or the name of a checkpoint in `output_dir`; its path will do too.

    Returns:
        `pathlib.Path`, *optional*: what was loaded; None where `"latest"` finds no checkpoint at all.

    Raises:
        ValueError: if the named checkpoint is not there or damaged, all of them are damaged, or it holds no loss scale
            where one is needed.
    """
    choice = [None, None]
    if accelerator.is_main_process:
        choice = list(_choose_checkpoint(output_dir, name))
    chosen, problem = broadcast_object_list(choice)
    if problem is not None:
        raise ValueError(problem)
    if chosen is None:
        return None
    if accelerator.scaler is not None and not pathlib.Path(chosen, SCALER_NAME).exists():
        raise ValueError(f"{chosen} was trained without `mixed_precision` fp16, which can't begin in between.")
    accelerator.load_state(chosen)
    # Nothing is half accumulated, also where another number is accumulated now.
    accelerator.step -= accelerator.step % accelerator.gradient_accumulation_steps
    if accelerator.is_main_process:
        folders = list_checkpoints(output_dir)
        # The run leaves newer ones behind; with their names they would be taken for its newest.
        for newer in folders[folders.index(pathlib.Path(chosen)) + 1 :] if pathlib.Path(chosen) in folders else []:
            if name == "latest":  # they are damaged
                partial = newer.with_name("checkpoint.partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
                shutil.rmtree(newer.rename(partial))
                continue
            aside = newer.with_name(f"old-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            logger.warning(f"{newer} is newer than where the run goes on from; it is now {newer.rename(aside)}.")
    accelerator.wait_for_everyone()
    return pathlib.Path(chosen)


def _choose_checkpoint(output_dir: str | os.PathLike, name: str) -> tuple[str | None, str | None]:
    """(folder, None), (None, what is wrong) or (None, None): nothing there yet."""
    if name != "latest":
        folder = pathlib.Path(output_dir, name)
        if pathlib.Path(name).resolve().parent == pathlib.Path(output_dir).resolve():
            folder = pathlib.Path(output_dir, pathlib.Path(name).name)
        problem = check_checkpoint(folder)
        return (None, f"Checkpoint {folder} can't be used: {problem}.") if problem else (str(folder), None)
    folders = list_checkpoints(output_dir)[::-1]
    for folder in folders:
        problem = check_checkpoint(folder)
        if problem is None:
            return str(folder), None
        logger.warning(f"Checkpoint {folder} is damaged: {problem}. Falling back to the one before.")
    return (
        None,
        f"All checkpoints of {output_dir} are damaged: {[path.name for path in folders]}." if folders else None,
    )

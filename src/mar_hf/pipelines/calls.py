# SPDX-License-Identifier: Apache-2.0
"""What a running call of a pipeline lets its callbacks see and change."""

from dataclasses import dataclass
from threading import get_ident


@dataclass
class PipelineCall:
    """What a running call lets its callbacks see and change, through the pipeline's properties.

    Args:
        guidance_scale (`float`, *optional*, defaults to 1.0): counts from the next step on.
        is_conditional (`bool`, *optional*, defaults to `False`): whether there is a class or text to guide to.
        num_timesteps (`int`, *optional*, defaults to 0): autoregressive steps.
        interrupt (`bool`, *optional*, defaults to `False`): no further steps.
    """

    guidance_scale: float = 1.0
    is_conditional: bool = False
    num_timesteps: int = 0
    interrupt: bool = False


class CallStateMixin:
    """The state of the call that runs, for pipelines that keep `_calls` by thread and the `_last_call`.

    Threads and calls from callbacks have states of their own: what is read or set here is that of the innermost call
    of the thread that asks.
    """

    _calls: dict[int, list[PipelineCall]]
    _last_call: PipelineCall

    @property
    def _call(self) -> PipelineCall:
        """The innermost running call of this thread, else the last one that ended."""
        running = self._calls.get(get_ident())
        return running[-1] if running else self._last_call

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running call; callbacks may change `_guidance_scale`."""
        return self._call.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._call.guidance_scale = value

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call is guided, in the steps of its interval."""
        return self._call.is_conditional and self._call.guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        """Autoregressive steps of the last call: as many as calls of the callback."""
        return self._call.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call was asked to stop: set `_interrupt` in a callback."""
        return self._call.interrupt

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._call.interrupt = value

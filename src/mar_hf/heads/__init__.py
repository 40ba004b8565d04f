# SPDX-License-Identifier: Apache-2.0
"""Token heads. A new one is a file `head_<name>.py` and a line here."""

from .head_base import TokenHead
from .head_categorical import CategoricalHead
from .head_diffusion import DiffusionHead
from .head_energy import EnergyHead
from .head_flow_matching import FlowMatchingHead
from .head_mixture import MixtureHead
from .head_shortcut import ShortcutHead
from .modulation import ModulatedHead


TOKEN_HEADS: dict[str, type[TokenHead]] = {
    "categorical": CategoricalHead,
    "diffusion": DiffusionHead,
    "energy": EnergyHead,
    "flow_matching": FlowMatchingHead,
    "mixture": MixtureHead,
    "shortcut": ShortcutHead,
}

__all__ = [
    "TOKEN_HEADS",
    "CategoricalHead",
    "DiffusionHead",
    "EnergyHead",
    "FlowMatchingHead",
    "MixtureHead",
    "ModulatedHead",
    "ShortcutHead",
    "TokenHead",
]

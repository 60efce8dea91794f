"""Ingredients of models and losses, each small, each of them known or suspected to spoil second derivatives somewhere.

No verdict is written down here: `derive.truth` finds it from the model and `whole_loss` alone.
"""

from hazards import layers, losses, wrappers  # noqa: F401

# isort: split
from hazards import tricks  # noqa: F401 - last: tables list them in the order they are registered
from hazards.base import HAZARDS, Hazard, like

__all__ = ["HAZARDS", "Hazard", "like"]

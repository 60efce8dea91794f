"""Ingredients of models and losses, each small, each of them known or suspected to spoil second derivatives somewhere.

No verdict is written down here: `derive.truth` finds it from the model and `whole_loss` alone.
"""

# ruff: noqa: F401, I001 - imported in the order in which tables list them
from hazards import layers, tokens, sequences, activations, losses, wrappers, tricks, state, points
from hazards import outside, held, magnitudes, zeros, kinks
from hazards import float32, float32_layers, float32_losses
from hazards import inseparable, forms, unequal, bare, layouts, arrays
from hazards import terms, wrapped, late, complexes, surroundings, written_out, kernels, differences, transforms
from hazards import left
from hazards.base import HAZARDS, Hazard, like

__all__ = ["HAZARDS", "Hazard", "like"]

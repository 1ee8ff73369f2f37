"""Fused operators: one file per operator, each with its schema, reference, autograd function and public functions."""

from spectral_ops.functional.blocksum import block_sum, bone_linear, bone_update, disha_linear

__all__ = ["block_sum", "bone_linear", "bone_update", "disha_linear"]

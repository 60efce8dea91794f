"""Arithmetic and frozen records: how a matrix is cut, what that takes, and what was decided.

In come a parameter layout, settings and measured costs; out go tilings, memory, placements, manifests and job plans.
Nothing here computes with tensors, or knows of stores and clusters.
"""

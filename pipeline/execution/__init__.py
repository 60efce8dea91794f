"""Tiles get computed, whatever happens: who computes which, what is lost and done again, and what a run has to tell.

In come a job plan and a pool of workers, real or virtual; out go tiles in storage, and events.
"""

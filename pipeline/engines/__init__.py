"""The ways to compute a tile of the Hessian from a batch, each an `Engine`; and what a call of one costs.

In come a placed problem, a batch, rows and columns; entries are added to a tensor. An engine knows nothing of tiles,
stores or other engines. `ENGINES` lists them, fastest first.
"""

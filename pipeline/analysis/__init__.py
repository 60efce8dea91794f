"""What a finished matrix is used for: norms of its blocks, and reports.

In comes a `Hessian`, which may be larger than memory; it is read chunk by chunk.
"""

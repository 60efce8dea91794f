"""A finished matrix: reading it, proving it, giving it away in another format.

In comes an output; out go a `StoredHessian`, a `Verification` by paths that share nothing with what computed it, or
files.
"""

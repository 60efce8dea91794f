"""What a finished matrix is used for: the handle that users hold, spectra, systems, norms, and reports.

In comes a `StoredHessian`, which may be larger than memory. `Hessian` is built of one class a theme, each over pieces
of the upper triangle (`MatrixView.pieces`), so that all works on views of some parameters, too.
"""

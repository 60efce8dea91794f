"""The function whose Hessian is wanted, and derivatives of it that share nothing with the engines.

In come a model, a loss and data in whatever form users have them; out goes a `Problem`, placed in a type on a device,
its loss and gradient, and products with its Hessian by plain double backward or by differences of the gradient.
"""

"""Pictures of a Hessian, by Matplotlib: each function draws arrays into axes, whoever these belong to."""

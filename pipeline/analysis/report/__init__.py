"""The report of a finished Hessian: one page that needs nothing else, and its pictures as files."""

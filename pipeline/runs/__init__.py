"""One call of a run from spec to proof, and calls by schedule.

In come a job spec or a problem; out goes a finished, proven output, whatever was there before.
"""

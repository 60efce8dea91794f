"""Everything that knows Ray: actors as workers, jobs that are submitted, machines that come and go.

In comes a job plan; out goes a pool of workers that `execution` drives.
"""

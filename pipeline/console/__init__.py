"""What people see of a command: tables, progress and log records, on a terminal or in a file.

In come plans, outcomes, states and events; out go lines. Nothing else draws, and nothing here computes.
"""

"""Objects at URLs: what a run writes and reads, chunk by chunk, in any store that fsspec knows.

In come chunks, receipts and manifests; out go the same bytes, checked, after retries where a store asks for them.
"""

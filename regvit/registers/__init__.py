"""Registers: norms and outlier tokens, the search for register neurons, test-time registers and their controls, runs, export,
and planting, which puts known register neurons into a model. Imports `regvit.files`, `regvit.data` and `regvit.models`.
"""

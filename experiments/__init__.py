"""Experiments: each one measures a published claim against its baseline, on the same data and budget.

Run ``python -m experiments --help``. The package is used from a checkout; it is not part of the installed library.
"""

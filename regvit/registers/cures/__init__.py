"""Cures of outlier tokens that train nothing, one file each; `cure` puts them into a model and takes them out, `options` says
which there are without importing torch. Imports what `regvit.registers` may. docs/cures.md has formulas and results.
"""

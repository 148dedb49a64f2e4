"""Finds the fastest block sizes of each kernel on one GPU: the content of configs/<gpu>.json.

search.py tries candidates, targets.py lists what is tried; `kineticlip bench --tune` runs them.
"""

from kineticlip_kernels.tune.search import Measure, Run, Target, TooLarge, grid, tune, with_rows

__all__ = ["Measure", "Run", "Target", "TooLarge", "grid", "tune", "with_rows"]

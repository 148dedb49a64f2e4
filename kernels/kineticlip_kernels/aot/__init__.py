"""Ahead of time: every kernel compiled for GPUs that are not there, and what is wrong with it.

    python -m kineticlip_kernels.aot [--json]

is `kineticlip bench --aot`. cases/ says what is launched, compile_triton.py compiles it in a
process of its own, checks.py judges what the assembler made of it, report.py prints that.
"""

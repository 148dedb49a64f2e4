"""What is compiled: one module a room or several, each with CASES and KINDS.

CASES: name -> function without arguments that runs ops on meta tensors. KINDS: kernel -> what
bounds it: "matrix" products, "memory", "stores" (memory, read at odd addresses but written in
rows), "bytes" (read and written a byte at a time) or "small" (its launch). MIN_ARCH, where there
is one, names cases that older GPUs cannot run.
"""

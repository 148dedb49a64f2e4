"""Fused operations of KinetiCLIP: each one a reference, a Triton kernel and a dispatcher."""

"""`graphed` with a planted slowdown of 5 %: a kernel that spins at the end of the graph."""

from harness.graphed import forward_slow as forward

__all__ = ["forward"]

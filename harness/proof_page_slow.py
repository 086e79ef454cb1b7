"""`proof_page` as a page whose forward is the slower one."""

from harness.proof_page import forward_slow as forward

__all__ = ["forward"]

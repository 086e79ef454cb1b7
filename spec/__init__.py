"""The operation this lab is about: the problem, its tensors, its cost, its cases and its oracle.

Nothing in here imports an implementation or the harness.
"""

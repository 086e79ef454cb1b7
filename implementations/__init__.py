"""The operation, implemented once a folder; `registry` says what there is.

The subpackages `torch` and `jax` are not the frameworks: never put this folder itself on `sys.path`.
"""

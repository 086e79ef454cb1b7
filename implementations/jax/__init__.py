"""TTT layers in JAX: a scan over mini-batches of a step for one head, spread by `vmap`."""

from implementations.registry import Implementation

_PAGES = {inner: f"implementations.jax.ttt_{inner}" for inner in ("linear", "mlp")}

ENTRIES = (
    Implementation("jax.scan", "jax", _PAGES),
    Implementation("jax.autodiff", "jax", dict.fromkeys(_PAGES, "implementations.jax.autodiff")),
)

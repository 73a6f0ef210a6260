# SPDX-License-Identifier: Apache-2.0
"""JAX: matrix products, jit-compiled fusions, a gradient and a scan."""

import os

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
os.environ["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
import numpy
from report import close, digest, report

assert jax.default_backend() == "gpu", jax.default_backend()
rng = numpy.random.default_rng(11)
a, b = (jnp.asarray(rng.standard_normal((512, 512)).astype(numpy.float32)) for _ in range(2))
product = jnp.matmul(a, b, precision="highest")
close("matmul", product, numpy.asarray(a, numpy.float64) @ numpy.asarray(b, numpy.float64), 1e-5)


@jax.jit
def layer(x, w):
    """A fusion with a reduction."""
    y = jnp.tanh(x @ w)
    return y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)


gradient = jax.jit(jax.grad(lambda w: jnp.sum(layer(a, w) ** 3)))(b)
final, _ = jax.lax.scan(lambda state, _: (layer(state, b), None), a, None, length=10)
half = jax.jit(lambda x, y: x.astype(jnp.bfloat16) @ y.astype(jnp.bfloat16))(a, b).astype(jnp.float32)
report(
    {
        "device": str(jax.devices()[0].device_kind),
        "matmul": digest(product),
        "layer": digest(layer(a, b)),
        "gradient": digest(gradient),
        "scan": digest(final),
        "bf16": digest(half),
        "sorted": digest(jnp.sort(a.ravel())[:100]),
        "random": digest(jax.random.normal(jax.random.key(0), (1000,))),
    },
    jax=jax.__version__,
)

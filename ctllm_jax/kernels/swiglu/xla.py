"""SwiGLU for XLA: two matmuls, and an activation whose backward pass saves only its two inputs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ctllm_jax.gathered import vary_together


def swiglu_xla(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array) -> jax.Array:
    """As `kernels.swiglu`."""
    # Two dims: with [B, S, D] the weights' gradient contracts two dims, for which XLA copies its wide operand on the
    # CPU.
    x_TD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return activate(jnp.dot(x_TD, gate_DF), jnp.dot(x_TD, up_DF)).reshape(*x.shape[:-1], gate_DF.shape[1])


def activate(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) ⊙ up in float32, returned in their dtype; its backward pass saves only gate and up."""
    return _activate(*vary_together(gate, up))


# Plain differentiation saves gate, up, the sigmoid and two products in float32; recomputing a sigmoid is cheaper.
@jax.custom_vjp
def _activate(gate, up):
    gate_f32 = gate.astype(jnp.float32)
    return (gate_f32 * jax.nn.sigmoid(gate_f32) * up.astype(jnp.float32)).astype(gate.dtype)


def _forward(gate, up):
    return _activate(gate, up), (gate, up)


def activation_gradient(gate: jax.Array, up: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cotangents of silu(gate) ⊙ up in gate and up, computed in float32, in gate's and up's dtypes."""
    dtypes = gate.dtype, up.dtype
    gate, up, cotangent = gate.astype(jnp.float32), up.astype(jnp.float32), cotangent.astype(jnp.float32)
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    # silu' = σ + silu · (1 - σ)
    slope = share + silu * (1 - share)
    return (cotangent * up * slope).astype(dtypes[0]), (cotangent * silu).astype(dtypes[1])


def _backward(residuals, cotangent):
    return activation_gradient(*residuals, cotangent)


_activate.defvjp(_forward, _backward)

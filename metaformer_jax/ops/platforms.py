"""One function in several forms: for CPUs, for TPUs, and for everything else.

The platform is that which a program is compiled for: a TPU's program has no
trace of the form for CPUs, even if it is compiled on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import custom_derivatives, lax

Array = jax.Array


def choose(cpu: Callable[..., Any] | None, default: Callable[..., Any],
           *args: Any, tpu: Callable[..., Any] | None = None) -> Any:
  """Calls `cpu` in a program for a CPU, `tpu` in a TPU's, else `default`.

  The gradient of a choice keeps what either form needs: for the form that is
  not taken, zeros, which a compiler drops from a program with both passes.
  `jax.custom_vjp` around the choice keeps nothing more than it says.

  Args:
    cpu: the form for CPUs; None if there is no other.
    default: the form for all other platforms; it counts as the function's cost
      (`models.cost`).
    *args: arrays, the arguments of all forms.
    tpu: the form for TPUs; None if there is no other.
  """
  forms = {name: form for name, form in (("cpu", cpu), ("tpu", tpu)) if form}
  if not forms:
    return default(*args)
  return lax.platform_dependent(*args, default=default, **forms)


class Forms(NamedTuple):
  """What a CPU computes of a function of x and a kernel, linear in each.

  None where the function, or its derivative by JAX, is as fast.

  Attributes:
    forward: (x, kernel) -> y.
    input_gradient: (dy, kernel, shape of x) -> dx.
    kernel_gradient: (x, dy, shape of the kernel) -> gradient of the kernel.
  """

  forward: Callable[[Array, Array], Array] | None = None
  input_gradient: Callable[..., Array] | None = None
  kernel_gradient: Callable[..., Array] | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def bilinear(plain: Callable[[Array, Array], Array], cpu: Forms, x: Array,
             kernel: Array) -> Array:
  """plain(x, kernel), by `cpu` in a program for a CPU, and so its gradients."""
  return choose(cpu.forward, plain, x, kernel)


def _fwd(plain, cpu, x, kernel):
  # () marks a gradient that is wanted: not that of images, or of frozen layers.
  wanted = tuple(() if v.perturbed else None for v in (x, kernel))
  x, kernel = x.value, kernel.value
  return bilinear(plain, cpu, x, kernel), (x, kernel, wanted)


def _bwd(plain, cpu, kept, dy):
  x, kernel, (wants_x, wants_kernel) = kept
  dx = dk = None
  if isinstance(dy, custom_derivatives.SymbolicZero):
    return dx, dk
  if wants_x is not None:
    dx = choose(
        cpu.input_gradient and functools.partial(
            cpu.input_gradient, shape=x.shape),
        lambda dy, kernel: jax.linear_transpose(
            lambda x: plain(x, kernel), x)(dy)[0], dy, kernel)
  if wants_kernel is not None:
    dk = choose(
        cpu.kernel_gradient and functools.partial(
            cpu.kernel_gradient, shape=kernel.shape),
        lambda x, dy: jax.linear_transpose(
            functools.partial(plain, x), kernel)(dy)[0], x, dy)
  return dx, dk


bilinear.defvjp(_fwd, _bwd, symbolic_zeros=True)

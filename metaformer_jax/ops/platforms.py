"""One function in several forms: for a platform, and for all others.

The platform is that which a program is compiled for: a TPU's program has no
trace of the form for CPUs, even if it is compiled on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_derivatives, lax

Array = jax.Array


def choose(default: Callable[..., Any], *args: Any,
           **forms: Callable[..., Any] | None) -> Any:
  """Calls the form for the platform that the program is compiled for.

  The gradient of a choice keeps what any form needs: for the forms that are not
  taken, zeros, which a compiler drops from a program with both passes.
  `jax.custom_vjp` around the choice keeps nothing more than it says.

  Args:
    default: the form for all platforms that have none of their own; it counts
      as the function's cost (`models.cost`).
    *args: arrays, the arguments of all forms.
    **forms: by the platform: "cpu", "cuda" (NVIDIA's GPUs), "tpu". None if it
      has no form of its own.
  """
  own = {platform: form for platform, form in forms.items() if form}
  return lax.platform_dependent(*args, default=default, **own) if own else (
      default(*args))


def computed_again(x: Array) -> Array:
  """x, for a gradient that recomputes values of the forward pass from it.

  Otherwise XLA finds on a CPU that both are equal, and keeps those of the
  forward pass: that is one pass more, and memory whose pages take time to make.
  """
  return choose(_unchanged, x, cpu=lax.optimization_barrier)


def unfused(x: Any) -> Any:
  """x, arrays that a CPU does not compute in one loop with what reads them.

  XLA gives a reduction to a library, YNNPACK, together with the operations
  before and after it (jaxlib 0.10.2). Their operands are then written in full:
  a vector over the channels is repeated for every pixel. The library has no
  clamp, so that one to all numbers, infinity included, separates the two.

  Args:
    x: a tree of float arrays.
  """
  return choose(_unchanged, x, cpu=functools.partial(jax.tree.map, _clamped))


def _unchanged(x):
  return x


def _clamped(x):
  low, high = (jnp.array(v, x.dtype) for v in (-jnp.inf, jnp.inf))
  return lax.clamp(low, x, high)


class Forms(NamedTuple):
  """What a platform computes of a function of x and a kernel, linear in each.

  None where the function, or its derivative by JAX, is as fast.

  Attributes:
    forward: (x, kernel) -> y.
    input_gradient: (dy, kernel, shape of x) -> dx.
    kernel_gradient: (x, dy, shape of the kernel) -> gradient of the kernel.
  """

  forward: Callable[[Array, Array], Array] | None = None
  input_gradient: Callable[..., Array] | None = None
  kernel_gradient: Callable[..., Array] | None = None

  def bind(self, **kwargs: Any) -> "Forms":
    """With these arguments of each given."""
    return Forms(*(form and functools.partial(form, **kwargs)
                   for form in self))


class Platforms(NamedTuple):
  """The forms of a function on each platform that has any."""

  cpu: Forms = Forms()
  cuda: Forms = Forms()

  def of(self, name: str,
         **kwargs: Any) -> dict[str, Callable[..., Array] | None]:
    """A field of `Forms`, by platform, with these arguments given."""
    return {platform: getattr(forms.bind(**kwargs), name)
            for platform, forms in self._asdict().items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def bilinear(plain: Callable[[Array, Array], Array], forms: Platforms, x: Array,
             kernel: Array) -> Array:
  """plain(x, kernel) and its gradients, by the platform's forms."""
  return choose(plain, x, kernel, **forms.of("forward"))


def _fwd(plain, forms, x, kernel):
  # () marks a gradient that is wanted: not that of images, or of frozen layers.
  wanted = tuple(() if v.perturbed else None for v in (x, kernel))
  x, kernel = x.value, kernel.value
  return bilinear(plain, forms, x, kernel), (x, kernel, wanted)


def _bwd(plain, forms, kept, dy):
  x, kernel, (wants_x, wants_kernel) = kept
  dx = dk = None
  if isinstance(dy, custom_derivatives.SymbolicZero):
    return dx, dk
  if wants_x is not None:
    dx = choose(
        lambda dy, kernel: jax.linear_transpose(
            lambda x: plain(x, kernel), x)(dy)[0],
        dy, kernel, **forms.of("input_gradient", shape=x.shape))
  if wants_kernel is not None:
    dk = choose(
        lambda x, dy: jax.linear_transpose(
            functools.partial(plain, x), kernel)(dy)[0],
        x, dy, **forms.of("kernel_gradient", shape=kernel.shape))
  return dx, dk


bilinear.defvjp(_fwd, _bwd, symbolic_zeros=True)

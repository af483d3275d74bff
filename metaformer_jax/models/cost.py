"""Parameters and operations of a model, from the traced program."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend import core as extend_core

from metaformer_jax.models import norms


class Cost(NamedTuple):
  """Cost of a forward pass of one image.

  Attributes:
    n_params: trainable parameters.
    n_frozen: values in the collection "frozen".
    macs: multiply-accumulates, as the papers count them.
  """

  n_params: int
  n_frozen: int
  macs: int


def of_model(model: nn.Module, image_size: int) -> Cost:
  """Counts a model of [B, image_size, image_size, 3] images; as `of_inputs`."""
  return of_inputs(model, jax.ShapeDtypeStruct(
      (1, image_size, image_size, 3), jnp.float32))


def of_inputs(model: nn.Module, *inputs: Any) -> Cost:
  """Counts a model for what its `init` takes: arrays, or their shapes.

  The multiply-accumulates are those of matrix products and convolutions.
  Like fvcore, which the first paper used, this adds 5 for each output value of
  PyTorch's GroupNorm and 2 for BatchNorm's, and nothing for the norms that the
  official code writes out: LayerNorm over channels, GroupNorm without a bias.
  """
  normalizing = 0

  def note(next_fn, args, kwargs, context):
    nonlocal normalizing
    y = next_fn(*args, **kwargs)
    if context.method_name != "__call__":
      return y
    if isinstance(context.module, norms.BatchNorm):
      normalizing += 2 * y.size
    elif isinstance(context.module, norms.GroupNorm) and (
        context.module.use_bias):
      normalizing += 5 * y.size
    return y

  with nn.intercept_methods(note):
    # Initialisation is a forward pass; drawing values has no products.
    traced, variables = jax.make_jaxpr(model.init, return_shape=True)(
        jax.random.key(0), *inputs)

  def count(collection):
    leaves = jax.tree.leaves(variables.get(collection, {}))
    return sum(x.size for x in leaves)

  return Cost(count("params"), count("frozen"),
              _jaxpr_macs(traced.jaxpr) + normalizing)


def count_macs(fn: Callable[..., Any], *args: Any) -> int:
  """Multiply-accumulates of a function's matrix products and convolutions.

  Additions, activations and pooling are not counted; loops, each iteration; of
  branches, the mean.

  Args:
    fn: a function that jax can trace.
    *args: arrays, or their `jax.ShapeDtypeStruct`s.
  """
  return _jaxpr_macs(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr_macs(jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      total += eqn.outvars[0].aval.size * math.prod(
          lhs[axis] for axis in contracted)
    elif name == "conv_general_dilated":
      # Kernel: [out, in / groups, *window], in the layout's own order. Zeros of
      # a dilated input, as in the gradient of a stride, do not count.
      out_axis = params["dimension_numbers"].rhs_spec[0]
      kernel = eqn.invars[1].aval.shape
      total += eqn.outvars[0].aval.size * (
          math.prod(kernel) // kernel[out_axis]) // math.prod(
              params["lhs_dilation"])
    elif params.get("branches_platforms"):  # `ops.platforms`; default is last.
      total += _jaxpr_macs(params["branches"][-1].jaxpr)
    else:
      inner = [_jaxpr_macs(inner)
               for inner in extend_core.jaxprs_in_params(params)]
      turns = (params["length"] if name == "scan" else
               params["mesh"].size if name == "shard_map" else 1)
      total += turns * sum(inner) // (len(inner) if name == "cond" else 1)
  return total

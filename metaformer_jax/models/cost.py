"""What a model costs, read off the traced program: nothing is computed."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend import core as extend_core

from metaformer_jax.models import norms


def count_params(model: nn.Module, image_size: int) -> int:
  """Number of trainable parameters of a model of [B, H, W, 3] images."""
  params = _abstract_variables(model, image_size)["params"]
  return sum(x.size for x in jax.tree.leaves(params))


def count_model_macs(model: nn.Module, image_size: int) -> int:
  """Multiply-accumulates of one image in the forward pass, as published.

  Those of matrix products and convolutions. fvcore, which the first paper
  counted with, adds 5 for each value out of PyTorch's GroupNorm and 2 for
  BatchNorm's, and knows no norm that is written out in the official code:
  LayerNorm over channels, GroupNorm without a bias. So it is done here.
  """
  normalizing = 0

  def note(next_fn, args, kwargs, context):
    nonlocal normalizing
    y = next_fn(*args, **kwargs)
    if isinstance(context.module, norms.BatchNorm):
      normalizing += 2 * y.size
    elif isinstance(context.module, norms.GroupNorm) and (
        context.module.use_bias):
      normalizing += 5 * y.size
    return y

  variables = _abstract_variables(model, image_size)
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  with nn.intercept_methods(note):
    macs = count_macs(model.apply, variables, image)
  return macs + normalizing


def count_macs(fn: Callable[..., Any], *args: Any) -> int:
  """Multiply-accumulates of the matrix products and convolutions of a function.

  Additions, activations and pooling are not counted. Loops count each turn.

  Args:
    fn: a function that jax can trace.
    *args: arrays, or their `jax.ShapeDtypeStruct`s.
  """
  return _jaxpr_macs(jax.make_jaxpr(fn)(*args).jaxpr)


def _abstract_variables(model, image_size):
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), image)


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
      # Kernel: [out, in / groups, *window], in the layout's own order.
      out_axis = params["dimension_numbers"].rhs_spec[0]
      kernel = eqn.invars[1].aval.shape
      total += eqn.outvars[0].aval.size * (
          math.prod(kernel) // kernel[out_axis])
    else:
      turns = params["length"] if name == "scan" else 1
      total += turns * sum(
          _jaxpr_macs(inner)
          for inner in extend_core.jaxprs_in_params(params))
  return total

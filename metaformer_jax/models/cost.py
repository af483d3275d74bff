"""Parameters and operations of a model, from the traced program."""

import collections
import math
import re
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
  """Counts a model for what its `init` takes, as `by_layer`; the sums of it."""
  layers = by_layer(model, *inputs)
  return Cost(*(sum(getattr(layer, name) for layer in layers)
                for name in Cost._fields))


class Layer(NamedTuple):
  """Cost of a module in a forward pass, without that of its sub-modules.

  Attributes:
    path: of the module; empty for the model.
    kind: the name of its class.
    outputs: shapes of the floating-point arrays that it returned last.
    n_calls: how often it was called.
    n_params, n_frozen, macs: as of `Cost`.
    param_bytes: of both kinds of parameters.
    activation_bytes: of what its calls returned, if they call no module; 0 for
      what they pass on as it is.
  """

  path: tuple[str, ...]
  kind: str
  outputs: tuple[tuple[int, ...], ...] = ()
  n_calls: int = 0
  n_params: int = 0
  n_frozen: int = 0
  macs: int = 0
  param_bytes: int = 0
  activation_bytes: int = 0


def by_layer(model: nn.Module, *inputs: Any,
             variables: Any = None) -> list[Layer]:
  """The cost of each module for what its `init` takes, in order of the calls.

  The multiply-accumulates are those of matrix products and convolutions.
  Like fvcore, which the first paper used, this adds 5 for each output value of
  PyTorch's GroupNorm and 2 for BatchNorm's, and nothing for the norms that the
  official code writes out: LayerNorm over channels, GroupNorm without a bias.

  Args:
    model: any module.
    *inputs: arrays, or their shapes.
    variables: whose parameters are counted, if they are not those that `init`
      gives for these inputs.
  """
  calls = _Calls()
  with nn.intercept_methods(calls.note):
    # Initialisation is a forward pass; drawing values has no products, and
    # blocks are neither scanned nor recomputed.
    traced, made = jax.make_jaxpr(model.init, return_shape=True)(
        jax.random.key(0), *inputs)
  macs = _macs_by_scope(traced.jaxpr)
  for i, n in calls.normalizing.items():
    macs[i] += n
  layers = calls.layers
  for i, layer in enumerate(layers):
    layers[i] = layer._replace(macs=macs[i])
  _add_parameters(layers, made if variables is None else variables)
  return layers


class _Calls:
  """What the modules of a trace returned; marks their operations."""

  def __init__(self):
    self.layers: list[Layer] = []
    self.normalizing = collections.Counter()
    self._numbers: dict[tuple[str, ...], int] = {}
    self._open: list[int] = []
    self._has_modules: set[int] = set()

  def note(self, next_fn, args, kwargs, context):
    """An interceptor for `nn.intercept_methods`."""
    module, method = context.module, context.method_name
    i = self._numbers.setdefault(module.path, len(self._numbers))
    if i == len(self.layers):
      self.layers.append(Layer(module.path, type(module).__name__))
    is_call = method == "__call__"
    if is_call:
      self._has_modules.update(self._open)
      self._open.append(i)
    with jax.named_scope(f"{_SCOPE}{i}"):
      y = next_fn(*args, **kwargs)
    if is_call:
      self._open.pop()
      self._add_call(i, module, args, y)
    elif not self.layers[i].outputs and method[0] != "_":
      self.layers[i] = self.layers[i]._replace(outputs=_shapes(y))
    return y

  def _add_call(self, i: int, module: nn.Module, args, y) -> None:
    if isinstance(module, norms.BatchNorm):
      self.normalizing[i] += 2 * y.size
    elif isinstance(module, norms.GroupNorm) and module.use_bias:
      self.normalizing[i] += 5 * y.size
    n_bytes = 0 if i in self._has_modules else sum(
        x.size * x.dtype.itemsize for x in _floats(y)
        if not any(x is arg for arg in args))
    layer = self.layers[i]
    self.layers[i] = layer._replace(
        outputs=_shapes(y), n_calls=layer.n_calls + 1,
        activation_bytes=layer.activation_bytes + n_bytes)


def _floats(tree: Any) -> list[Any]:
  return [x for x in jax.tree.leaves(tree)
          if jnp.issubdtype(getattr(x, "dtype", int), jnp.floating)]


def _shapes(tree: Any) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(x.shape) for x in _floats(tree))


def _add_parameters(layers: list[Layer], variables: Any) -> None:
  """Adds each parameter to the module that has it, in place."""
  numbers = {layer.path: i for i, layer in enumerate(layers)}
  for collection, name in (("params", "n_params"), ("frozen", "n_frozen")):
    for keys, x in jax.tree_util.tree_flatten_with_path(
        variables.get(collection, {}))[0]:
      path = tuple(key.key for key in keys)
      i = next(numbers[path[:n]] for n in range(len(path), -1, -1)
               if path[:n] in numbers)
      layers[i] = layers[i]._replace(**{
          name: getattr(layers[i], name) + x.size,
          "param_bytes": layers[i].param_bytes + x.size * x.dtype.itemsize})


def count_macs(fn: Callable[..., Any], *args: Any) -> int:
  """Multiply-accumulates of a function's matrix products and convolutions.

  Additions, activations and pooling are not counted; loops, each iteration; of
  branches, the mean.

  Args:
    fn: a function that jax can trace.
    *args: arrays, or their `jax.ShapeDtypeStruct`s.
  """
  return _macs_by_scope(jax.make_jaxpr(fn)(*args).jaxpr).total()


# Begins the names of the scopes that `by_layer` counts by; a number follows.
_SCOPE = "layer:"
_NUMBER = re.compile(rf"{_SCOPE}(\d+)")


def _macs_by_scope(jaxpr, outer: int = 0) -> collections.Counter[int]:
  """Multiply-accumulates by the innermost scope with a number, else `outer`."""
  total = collections.Counter()
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      total[_scope(eqn, outer)] += eqn.outvars[0].aval.size * math.prod(
          lhs[axis] for axis in contracted)
    elif name == "conv_general_dilated":
      # Kernel: [out, in / groups, *window], in the layout's own order. Zeros of
      # a dilated input, as in the gradient of a stride, do not count.
      out_axis = params["dimension_numbers"].rhs_spec[0]
      kernel = eqn.invars[1].aval.shape
      total[_scope(eqn, outer)] += eqn.outvars[0].aval.size * (
          math.prod(kernel) // kernel[out_axis]) // math.prod(
              params["lhs_dilation"])
    elif params.get("branches_platforms"):  # `ops.platforms`; default is last.
      total += _macs_by_scope(params["branches"][-1].jaxpr, _scope(eqn, outer))
    elif inner := list(extend_core.jaxprs_in_params(params)):
      scope = _scope(eqn, outer)
      found = sum((_macs_by_scope(each, scope) for each in inner),
                  collections.Counter())
      turns = (params["length"] if name == "scan" else
               params["mesh"].size if name == "shard_map" else 1)
      parts = len(inner) if name == "cond" else 1
      total.update({i: turns * n // parts for i, n in found.items()})
  return total


def _scope(eqn, outer: int) -> int:
  numbers = _NUMBER.findall(str(eqn.source_info.name_stack))
  return int(numbers[-1]) if numbers else outer

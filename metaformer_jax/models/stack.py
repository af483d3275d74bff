"""Runs the blocks of a stage: one by one, or as a loop over one of them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import core
from flax import linen as nn
from jax.extend import core as extend_core

from metaformer_jax.models import layers


def _is_product(primitive, *inputs, **params) -> bool:
  """Whether an operation is a matrix product over channels, as `layers.Dense`.

  Those of attention are over pairs of pixels: they have batch dimensions.
  """
  is_dot = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return is_dot(primitive, *inputs, **params) or (
      primitive.name == "custom_vjp_call" and any(
          is_dot(eqn.primitive, **eqn.params)
          for jaxpr in extend_core.jaxprs_in_params(params)
          for eqn in jaxpr.eqns))


# What the backward pass finds in memory, besides a block's input.
_POLICIES = {"dots": _is_product,
             "block": jax.checkpoint_policies.nothing_saveable}


def run(stage: nn.Module, block: Callable[..., nn.Module],
        rates: Sequence[float], x: jax.Array, *, mask: jax.Array | None,
        train: bool, scan: bool = False, remat: str = "none") -> jax.Array:
  """Passes x through blocks, the sub-modules "block1", ... of `stage`.

  With `scan` and `remat`, values and gradients are the same within rounding,
  and so are variables, draws of DropPath and captured intermediates.
  Initialisation has neither.

  Args:
    stage: a compact module, within its call.
    block: a factory, `block(drop_path_rate=..., name=...)`, of modules
      `module(x, mask=..., train=...)` that keep shape and dtype.
    rates: the drop path rate of each block.
    x: [B, H, W, C].
    mask: [B, H, W] or None; see `layers`.
    train: whether dropout and drop path are on.
    scan: whether the blocks are one `lax.scan` over their variables, which are
      stacked for it. Only their "drop_path1" and "drop_path2" may draw. What
      `nn.intercept_methods` sees is the first block, once.
    remat: what the gradient computes again, as in `compiling.Compile`.
  """
  if stage.is_initializing():
    scan, remat = False, "none"
  if scan and len(rates) > 1:
    return _scanned(stage, block, rates, x, mask, train, remat)

  def call(module, x):
    return module(x, mask=mask, train=train)

  if remat != "none":
    call = nn.remat(call, policy=_POLICIES[remat])
  for i, rate in enumerate(rates, 1):
    x = call(block(drop_path_rate=rate, name=f"block{i}"), x)
  return x


def _scanned(stage, block, rates, x, mask, train, remat):
  names = [f"block{i}" for i in range(1, len(rates) + 1)]
  each = [_within(stage.variables, (name,)) for name in names]
  if train and any(rates):
    for variables, name, rate in zip(each, names, rates):
      variables[layers.DRAWS] = _draws(stage, name, rate)

  def body(x, variables):
    return _call(block(drop_path_rate=max(rates), parent=None),
                 (*stage.path, names[0]), stage.scope.mutable, variables, x,
                 mask=mask, train=train)

  if remat != "none":
    body = jax.checkpoint(body, prevent_cse=False, policy=_POLICIES[remat])
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
  x, changed = jax.lax.scan(body, x, stacked)
  for collection, tree in changed.items():
    for i, name in enumerate(names):
      stage.put_variable(collection, name,
                         jax.tree.map(lambda leaf, i=i: leaf[i], tree))
  return x


def _draws(stage: nn.Module, block: str, rate: float) -> dict[str, Any]:
  """The variables by which a block's DropPaths draw as they do unrolled."""
  scope = stage.scope.push(block, reuse=True)
  return {name: {"keep": np.float32(1 - rate),
                 "key": scope.push(name, reuse=True).make_rng("drop_path")}
          for name in ("drop_path1", "drop_path2")}


def _call(module: nn.Module, path: tuple[str, ...], mutable: Any,
          variables: Mapping[str, Any], x: jax.Array,
          **kwargs) -> tuple[jax.Array, dict[str, Any]]:
  """Calls an unbound module as if it were at `path`, but without random keys.

  Returns:
    Its output, and its variables of the mutable collections.
  """

  def call(scope, x):
    for name in path:
      scope = scope.push(name)
    return module.clone(parent=scope)(x, **kwargs)

  def nested(tree):
    return functools.reduce(lambda inner, name: {name: inner},
                            reversed(path), tree)

  x, changed = core.apply(call, mutable=mutable or ())(
      {name: nested(tree) for name, tree in variables.items()}, x)
  changed = _within(changed, path)
  changed.pop(layers.DRAWS, None)
  return x, changed


def _within(variables: Mapping[str, Any],
            path: Sequence[str]) -> dict[str, Any]:
  """The variables of a sub-module, {collection: variables}."""
  found = {}
  for collection, tree in variables.items():
    for name in path:
      tree = tree.get(name, {})
    if tree:
      found[collection] = tree
  return found

"""The branches of a training MetaFormer block as kernels, where there are any.

A kernel is the whole branch, from the norm to the shortcut, and a function of
its parameters; the modules of which it takes the place only name these. What
has no kernel is None, and the block calls its modules. The kernels themselves
take the plain form for sizes that do not fit, which `compiling` notes, and on
other chips than TPUs (`kernels`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from metaformer_jax.kernels import branch
from metaformer_jax.kernels import mlp as mlp_kernel
from metaformer_jax.kernels import pooling as pooling_kernel
from metaformer_jax.kernels import sepconv as sepconv_kernel
from metaformer_jax.models import compiling, layers, mixers, norms

Branch = Callable[[jax.Array], jax.Array]
# As the kernels name them.
_NORMS = {norms.GroupNorm: "group_norm", norms.LayerNorm: "layer_norm"}


def token_mixer(block: nn.Module, norm: nn.Module, mixer: nn.Module, *,
                mask: jax.Array | None, train: bool) -> Branch | None:
  """The first branch: x + s (mixer(norm(x))), of a block that is called.

  Args:
    block: a `MetaFormerBlock`.
    norm, mixer: its modules "norm1" and "token_mixer".
    mask: of the images; there are no kernels for padded ones.
    train: whether it is a training step; there are no kernels for others.
  """
  if not _has_kernels(block, norm, mask, train):
    return None
  if type(mixer) is mixers.Pooling and type(norm) is norms.GroupNorm:
    return _pooling(block, norm, mixer)
  if (type(mixer) is mixers.SepConv
      and mixer.activation in branch.ACTIVATIONS):
    return _sepconv(block, norm, mixer)
  return None


def _pooling(block, norm, mixer):
  return functools.partial(
      _call, block, 1, functools.partial(
          pooling_kernel.pooling_branch, size=mixer.pool_size,
          subtract=mixer.pool_subtract, eps=norm.eps), (),
      problem=functools.partial(
          pooling_kernel.problem, size=mixer.pool_size))


def _sepconv(block, norm, mixer):
  expand, act, depthwise, project = (
      block.get_variable("params", "token_mixer").get(name, {})
      for name in ("pwconv1", "act1", "dwconv", "pwconv2"))
  kind = {"norm": _NORMS[type(norm)], "activation": mixer.activation}
  return functools.partial(
      _call, block, 1, functools.partial(
          sepconv_kernel.sepconv_branch, eps=norm.eps, **kind),
      (expand["kernel"], act.get("scale"), act.get("bias"),
       depthwise["kernel"], project["kernel"]),
      problem=functools.partial(
          sepconv_kernel.problem, hidden=expand["kernel"].shape[1],
          kernel=mixer.conv_kernel_size, **kind))


def mlp(block: nn.Module, norm: nn.Module, *, mask: jax.Array | None,
        train: bool) -> Branch | None:
  """The second branch: x + s (mlp(norm(x))); arguments as of `token_mixer`."""
  if not (_has_kernels(block, norm, mask, train) and not block.drop_rate
          and block.activation in branch.ACTIVATIONS):
    return None
  fc1, act, fc2 = (block.get_variable("params", "mlp").get(name, {})
                   for name in ("fc1", "act", "fc2"))
  kind = {"norm": _NORMS[type(norm)], "activation": block.activation}
  return functools.partial(
      _call, block, 2, functools.partial(
          mlp_kernel.mlp_branch, eps=norm.eps, **kind),
      (fc1["kernel"], fc1.get("bias"), act.get("scale"), act.get("bias"),
       fc2["kernel"], fc2.get("bias")),
      problem=functools.partial(
          mlp_kernel.problem, hidden=fc1["kernel"].shape[1], **kind))


def _has_kernels(block, norm, mask, train) -> bool:
  return (block.kernels == "pallas" and train and mask is None
          and not block.is_initializing() and type(norm) in _NORMS
          and block.residual)


def _call(block: nn.Module, i: int, kernel: Callable[..., jax.Array],
          inner: tuple[Any, ...], x: jax.Array, *,
          problem: Callable[..., str | None]) -> jax.Array:
  """Calls the kernel of branch i, of which `inner` are the parameters.

  `problem` says why there is none for images of a shape and dtype.
  """
  stage = "/".join(block.path[:-1])
  shape = list(branch.local_shape(x.shape) or x.shape)
  compiling.note(
      f"the {'token mixer' if i == 1 else 'MLP'} of {stage} {shape}",
      branch.problem(x.shape, functools.partial(problem, dtype=x.dtype)))
  ones = jnp.ones(len(x), jnp.float32)
  keep = layers.DropPath(block.drop_path_rate, name=f"drop_path{i}")(
      ones, train=True)
  norm = block.get_variable("params", f"norm{i}")
  scales = (block.get_variable("params", f"{name}_scale{i}", {}).get("scale")
            for name in ("layer", "res"))
  return kernel(x, keep, norm["scale"], norm.get("bias"), *inner, *scales)

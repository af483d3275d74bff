"""Hyper-parameters that families share with the layers that have them. No jax.

`settings` has the families, and what is said there holds here.
"""

import dataclasses

from metaformer_jax.models.options import option


@dataclasses.dataclass(kw_only=True)
class Dropout:
  """Of models with dropout in the blocks."""

  drop_rate: float = option(0.0, "dropout in the blocks", low=0, high=0.999,
                            role="training")


@dataclasses.dataclass(kw_only=True)
class NormEps:
  """Of the transformers and MLP-Mixer."""

  norm_eps: float = option(1e-6, "epsilon of the norms", above=0)


@dataclasses.dataclass(kw_only=True)
class Pooling:
  """Of the mixer "pooling"."""

  pool_size: int = option(3, "window side of pooling", low=1, each="odd")
  pool_subtract: bool = option(True, "pooling subtracts its input")


@dataclasses.dataclass(kw_only=True)
class ConvInit:
  """Of all convolutions of a MetaFormer."""

  conv_init: str = option(
      "torch", "initial weights of the convolutions", role="training",
      choices=("torch", "trunc_normal"))


@dataclasses.dataclass(kw_only=True)
class Convolution(ConvInit):
  """Of the mixers "depthwise_conv" and "sepconv"."""

  conv_kernel_size: int = option(
      3, "of depthwise_conv and sepconv", low=1, each="odd", role="shape")


@dataclasses.dataclass(kw_only=True)
class Attention:
  """Of the mixer "attention"."""

  attention_proj_bias: bool = option(True, "attention ends with a bias",
                                     role="shape")


@dataclasses.dataclass(kw_only=True)
class Activation:
  """Of the MLPs and the mixer "sepconv"."""

  activation: str = option("gelu", "of MLPs and sepconv", own=True, choices=(
      "gelu", "relu", "silu", "squared_relu", "star_relu"))


@dataclasses.dataclass(kw_only=True)
class MetaFormerBlock(Activation, Dropout):
  """Of the blocks of a MetaFormer, whatever their mixer."""

  mlp_ratio: float = option(4.0, "hidden / outer channels; 0: no MLP", low=0,
                            role="shape")
  mlp_bias: bool = option(True, "the MLPs have biases", role="shape")
  residual: bool = option(True, "blocks add to their input")
  layer_scale_init: float = option(
      1e-5, "initial value of LayerScale; 0: none", role="shape")

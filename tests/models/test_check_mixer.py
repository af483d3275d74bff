"""`check_mixer` accepts the package's mixers, and names what others lack."""

import functools

import jax.numpy as jnp
import pytest
from flax import linen as nn

import metaformer_jax
from metaformer_jax import errors, testing
from metaformer_jax.models import check_mixer, mixers


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (
        name in ("attention", "depthwise_conv"))) for name in mixers.MIXERS])
def test_the_papers_mixers_pass(name):
  metaformer_jax.check_mixer(name)


class Own(nn.Module):
  """Keeps the contract; the mixers below break it in one way each."""

  dim: int
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, mask=None, train=False):
    return nn.Dense(self.dim, dtype=self.dtype, name="fc")(x)


class OtherShape(Own):
  @nn.compact
  def __call__(self, x, *, mask=None, train=False):
    return nn.Dense(self.dim + 1, dtype=self.dtype, name="fc")(x)


class Half(Own):
  @nn.compact
  def __call__(self, x, *, mask=None, train=False):
    return nn.Dense(self.dim, dtype=self.dtype, param_dtype=jnp.bfloat16,
                    name="fc")(x)


class Upcasts(Own):
  def __call__(self, x, *, mask=None, train=False):
    return x.astype(jnp.float32) * 2


class FailsInBfloat16(Own):
  def __call__(self, x, *, mask=None, train=False):
    if x.dtype != jnp.float32:
      raise TypeError("float32 only")
    return x


class NotDifferentiable(Own):
  def __call__(self, x, *, mask=None, train=False):
    return jnp.sqrt(jnp.abs(x - x))


class NoMask(Own):
  def __call__(self, x, *, train=False):
    return x


class IgnoresMask(Own):
  def __call__(self, x, *, mask=None, train=False):
    return x + jnp.roll(x, 1, 1)


class CountsPadding(Own):
  """Sets the padding to zero, but divides by all pixels."""

  def __call__(self, x, *, mask=None, train=False):
    if mask is not None:
      x = jnp.where(mask[..., None], x, 0)
    return x - x.mean((1, 2), keepdims=True)


class RefusesMask(Own):
  def __call__(self, x, *, mask=None, train=False):
    if mask is not None:
      raise ValueError("cannot ignore padding")
    return x + jnp.roll(x, 1, 1)


class BroadcastsMask(Own):
  """Raises a ValueError, but not because it refuses a mask."""

  def __call__(self, x, *, mask=None, train=False):
    return x if mask is None else jnp.broadcast_to(mask, x.shape) * x


class OneSize(Own):
  def __call__(self, x, *, mask=None, train=False):
    return x + jnp.ones((1, 9, 8, 1))


class DependsOnValues(Own):
  def __call__(self, x, *, mask=None, train=False):
    return x if float(x.sum()) > 0 else -x


class OnlyInTraining(Own):
  def __call__(self, x, *, mask=None, train=False):
    return x[:, ::2] if train else x


@pytest.mark.parametrize("mixer", [Own, RefusesMask])
def test_others_that_keep_the_contract_pass(mixer):
  metaformer_jax.check_mixer(mixer)


@pytest.mark.parametrize("mixer,check,words", [
    (OtherShape, "shape", "must have the shape of the input"),
    (OnlyInTraining, "shape", "must have the shape of the input"),
    (Half, "dtype", "parameters must be float32"),
    (Upcasts, "bfloat16", "the output is float32"),
    (FailsInBfloat16, "bfloat16", "float32 only"),
    (NotDifferentiable, "gradient", "of the input is not finite"),
    (NoMask, "mask", "unexpected keyword argument 'mask'"),
    (IgnoresMask, "mask", "must ignore the pixels where it is false"),
    (CountsPadding, "mask", "other values than alone"),
    (BroadcastsMask, "mask", "Incompatible types"),
    (OneSize, "other_sizes", "add got incompatible shapes"),
    (DependsOnValues, "jit", "float"),
], ids=lambda value: getattr(value, "__name__", None))
def test_what_is_missing_is_named(mixer, check, words):
  with pytest.raises(ValueError) as caught:
    check_mixer.check_mixer(mixer, checks=[check])
  message = str(caught.value)
  assert message.startswith(f"{mixer.__name__}: {check}: "), message
  assert words in message and "\n" not in message, message


def test_all_that_is_wrong_is_in_one_line():
  with pytest.raises(ValueError, match=r"mask: .*; also bfloat16: ") as caught:
    metaformer_jax.check_mixer(functools.partial(
        type("Both", (IgnoresMask,), {"__call__": (
            lambda self, x, *, mask=None, train=False:
            (x + jnp.roll(x, 1, 1)).astype(jnp.float32))})))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factory", [
    lambda dim, dtype, name: (lambda x: x), lambda dim: Own(dim), 3])
def test_what_is_no_mixer(factory):
  with pytest.raises(ValueError, match="cannot be made by factory"):
    metaformer_jax.check_mixer(factory)


@pytest.mark.parametrize("path,words", [
    ("no_such_module_here:Shift", "there is no module 'no_such_module_here'"),
    ("metaformer_jax.models.mixers:Poolin", "did you mean Pooling"),
    ("metaformer_jax.models.mixers:MIXERS", "is a dict, which cannot be")])
def test_a_path_of_nothing(path, words):
  with pytest.raises(errors.ConfigError, match=words):
    metaformer_jax.check_mixer(path)


class TestWithPytest(testing.MixerTest):
  mixer = "metaformer_jax.models.mixers:Attention"
  dim = 32

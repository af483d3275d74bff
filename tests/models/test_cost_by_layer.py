"""Costs by layer: sums, and each layer's own by its kernel and output."""

import math

import jax
import jax.numpy as jnp
import pytest
import small_models
from flax import linen as nn

import metaformer_jax
from metaformer_jax.models import compiling, cost

IMAGE = jax.ShapeDtypeStruct((1, 32, 40, 3), jnp.float32)
STAGES = small_models.TWO_STAGES | {"res_scale_init": ()}
# Besides those of one mixer; the random matrices are frozen.
MIXED = {
    "randformer_s12": STAGES | {"token_mixers": ("identity", "random")},
    "convformer_s18": STAGES | {"token_mixers": ("sepconv", "attention"),
                                "head": "mlp"},
    "metaformer_ppff_s12_224": STAGES | {
        "token_mixers": ("pooling", "spatial_fc")},
    "resnet50": small_models.MODELS["resnet18"],
    "vit_base_patch16_224": small_models.MODELS[
        "deit_base_distilled_patch16_224"],
}
MODELS = small_models.MODELS | MIXED


def own_macs(layer, params):
  """Of a layer with a kernel: a product for each output and value before it."""
  for name in layer.path:
    params = params.get(name, {})
  kernel = params.get("kernel")
  if layer.kind not in ("Conv", "Dense"):
    return None
  (output,) = layer.outputs
  return math.prod(output) * math.prod(kernel.shape[:-1])


@pytest.mark.parametrize("name", MODELS)
def test_layers_add_up_and_have_the_products_of_their_kernels(name):
  model = metaformer_jax.create_model(name, **MODELS[name])
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
  layers = cost.by_layer(model, IMAGE)
  assert len({layer.path for layer in layers}) == len(layers)
  n_bytes = 0
  for collection, key in (("params", "n_params"), ("frozen", "n_frozen")):
    leaves = jax.tree.leaves(shapes.get(collection, {}))
    assert sum(getattr(layer, key) for layer in layers) == sum(
        x.size for x in leaves)
    n_bytes += 4 * sum(x.size for x in leaves)
  assert sum(layer.param_bytes for layer in layers) == n_bytes
  # Without any scopes, and of another trace: without the norms' additions.
  plain = cost.count_macs(model.apply, shapes, IMAGE)
  norms = sum(layer.macs for layer in layers
              if layer.kind in ("GroupNorm", "BatchNorm"))
  assert sum(layer.macs for layer in layers) == plain + norms > norms
  n_kernels = 0
  for layer in layers:
    want = own_macs(layer, shapes["params"])
    n_kernels += want is not None
    assert want in (None, layer.macs), layer
  assert n_kernels >= 5


def test_scanned_blocks_count_as_others():
  settings = STAGES | {"depths": (3, 2), "token_mixers": ("sepconv",
                                                          "attention")}
  plain, scanned = (
      metaformer_jax.create_model("caformer_s18", compile=form, **settings)
      for form in (compiling.Compile(),
                   compiling.Compile(scan=True, remat=("block",))))
  assert cost.by_layer(plain, IMAGE) == cost.by_layer(scanned, IMAGE)


class Product(nn.Module):
  """x x^T: einsum is compiled once for all modules with the same shapes."""

  @nn.compact
  def __call__(self, x):
    return jnp.einsum("bnc,bmc->bnm", x, x)


class Shared(nn.Module):
  """One layer for two lengths, in one of them twice; a value of its own."""

  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(4, name="dense")
    x = dense(dense(x)) + self.param("own", nn.initializers.zeros, (4,))[
        None, None]
    short = jax.jit(lambda y: nn.Dropout(0.5, name="drop")(
        y, deterministic=True))(dense(x[:, :2]))
    return short, Product(name="one")(x), Product(name="two")(x)


def test_shared_modules_count_by_call_and_their_parameters_once():
  layers = {"/".join(layer.path): layer for layer in cost.by_layer(
      Shared(), jax.ShapeDtypeStruct((1, 5, 4), jnp.bfloat16))}
  dense, own = layers["dense"], layers[""]
  assert (dense.n_calls, dense.n_params, dense.param_bytes) == (3, 20, 80)
  assert dense.macs == (5 + 5 + 2) * 4 * 4
  # float32, as the parameters are.
  assert dense.activation_bytes == (5 + 5 + 2) * 4 * 4
  assert dense.outputs == ((1, 2, 4),)
  assert (own.n_params, own.macs, own.activation_bytes) == (4, 0, 0)
  assert layers["drop"].activation_bytes == 0  # Passed on.
  for name in ("one", "two"):
    assert layers[name].macs == 5 * 5 * 4
    assert layers[name].activation_bytes == 5 * 5 * 4
  assert own.outputs == ((1, 2, 4), (1, 5, 5), (1, 5, 5))

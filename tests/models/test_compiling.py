"""Scanned and recomputed blocks give what blocks one by one give."""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend import core as extend_core

import metaformer_jax
from metaformer_jax.models import compiling, cost, norms

SCAN = compiling.Compile(scan=True)
FORMS = {
    "scan": SCAN,
    "remat": compiling.Compile(remat=("block",)),
    "both": compiling.Compile(scan=True, remat=("dots",)),
}

# Overrides of PoolFormer-S12.
CASES = {
    "poolformer": {"depths": (1, 2), "dims": (8, 12),
                   "token_mixers": ("pooling",) * 2},
    "caformer": {"depths": (2, 2), "dims": (8, 12), "norm": "layer_norm",
                 "token_mixers": ("sepconv", "attention"), "norm_bias": False,
                 "activation": "star_relu", "layer_scale_init": 0.0,
                 "res_scale_init": (0.0, 1.0)},
    "randformer": {"depths": (2,), "dims": (8,), "mlp_bias": False,
                   "token_mixers": ("random",)},
    "batch norm": {"depths": (3,), "dims": (8,), "norm": "batch_norm",
                   "token_mixers": ("pooling",)},
}
FAST = [("caformer", "both")]


def create(overrides, compile=None, **kwargs):
  return metaformer_jax.create_model(
      "poolformer_s12", num_classes=5, compile=compile,
      **{"drop_path_rate": 0.6, **overrides}, **kwargs)


def perturbed(model, x):
  """Variables with every value moved away from its initial one."""
  variables = jax.jit(model.init)(jax.random.key(0), x)
  leaves, tree = jax.tree.flatten(variables)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(tree, [
      leaf if leaf.dtype == jnp.int32 else np.float32(
          leaf + 0.2 * np.abs(rng.normal(size=leaf.shape))) for leaf in leaves])


def images(n=4, height=37, width=29):
  """Odd sizes, and two images that leave some of the canvas empty."""
  x = np.random.default_rng(1).normal(
      size=(n, height, width, 3)).astype(np.float32)
  mask = np.ones((n, height, width), bool)
  mask[0, 22:], mask[1, :, 17:] = False, False
  return x, mask


@functools.partial(jax.jit, static_argnums=0)
def trained(model, variables, x, mask):
  """Logits, gradients and the new state of a step with drop path."""
  params, state = variables["params"], dict(variables)
  del state["params"]

  def loss(params):
    y, updates = model.apply(
        {"params": params, **state}, x, mask=mask, train=True,
        rngs={"drop_path": jax.random.key(7)}, mutable=["batch_stats"])
    return jnp.square(y - 1).mean(), (y, updates)

  (_, (y, updates)), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return y, grads, updates


def assert_near(got, want, atol):
  for (path, a), (_, b) in zip(
      jax.tree_util.tree_leaves_with_path(got),
      jax.tree_util.tree_leaves_with_path(want), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(
        a, b, atol=atol * max(1, np.abs(b).max(initial=0)),
        err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("case,form", [
    pytest.param(case, form,
                 marks=[] if (case, form) in FAST else pytest.mark.slow)
    for case in CASES for form in FORMS])
def test_a_step_is_the_same_in_every_form(case, form):
  x, mask = images()
  if case == "randformer":
    mask = None
  plain, model = create(CASES[case]), create(CASES[case], FORMS[form])
  variables = perturbed(plain, x)
  want = trained(plain, variables, x, mask)
  got = trained(model, variables, x, mask)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert_near(got, want, 1e-6 if form == "remat" else 1e-5)
  if case == "batch norm":
    found = got[2]["batch_stats"]["stage1"]
    for name in ("block1", "block2", "block3"):
      assert found[name]["norm1"]["n_batches"] == 1


def test_all_forms_are_initialised_alike():
  x, _ = images()
  overrides = {**CASES["batch norm"], "depths": (2,)}
  want, *others = (_text(jax.make_jaxpr(create(overrides, form).init)(
      jax.random.key(0), x)) for form in (None, *FORMS.values()))
  assert others == [want] * 3


def _text(traced):
  return re.sub("0x[0-9a-f]+", "", str(traced))


def _n_products(jaxpr):
  """Matrix products in a program's text, loops once."""
  return sum((eqn.primitive.name == "dot_general") + sum(
      map(_n_products, extend_core.jaxprs_in_params(eqn.params)))
             for eqn in jaxpr.eqns)


def test_a_scanned_program_does_not_grow_with_the_blocks():
  x, _ = images()
  sizes = {}
  for compile in (None, SCAN):
    for depth in (2, 3):
      model = create({"depths": (depth,), "dims": (8,),
                      "token_mixers": ("pooling",)}, compile)
      variables = jax.eval_shape(model.init, jax.random.key(0), x)
      traced = jax.make_jaxpr(functools.partial(
          trained.__wrapped__, model))(variables, x, None)
      sizes[compile, depth] = _n_products(traced.jaxpr)
  one_block = sizes[None, 3] - sizes[None, 2]
  assert one_block >= 6
  assert sizes[SCAN, 2] == sizes[SCAN, 3] == sizes[None, 2] - one_block


@pytest.mark.parametrize("scan", [
    False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["unrolled", "scanned"])
def test_remat_keeps_less(scan):
  """Bytes that wait for the backward pass, by policy and by stage."""
  overrides = {"depths": (2, 2), "dims": (8, 12), "token_mixers": (
      "pooling", "attention"), "drop_path_rate": 0.0}
  x, _ = images()
  variables = jax.eval_shape(create(overrides).init, jax.random.key(0), x)

  def kept(*remat):
    model = create(overrides, compiling.Compile(scan=scan, remat=remat))
    _, gradient = jax.eval_shape(functools.partial(
        jax.vjp, functools.partial(model.apply, x=x)), variables)
    return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(gradient))

  none, dots, block = kept("none"), kept("dots"), kept("block")
  assert block < 0.5 * dots < 0.4 * none
  assert block < kept("block", "none") < none
  assert kept("none", "block") + kept("block", "none") == none + block


@pytest.mark.slow
def test_what_is_captured_is_the_same():
  overrides = CASES["batch norm"]
  x, mask = images()
  variables = perturbed(create(overrides), x)
  want, got = (jax.jit(functools.partial(
      create(overrides, form).apply, capture_intermediates=True))(
          variables, x, mask=mask) for form in (None, FORMS["both"]))
  assert {"block1", "block3"} <= got[1]["intermediates"]["stage1"].keys()
  assert_near(got, want, 1e-5)


def test_methods_can_be_intercepted():
  """BatchNorm with its running statistics in a training step."""
  overrides = {**CASES["batch norm"], "depths": (2,)}
  x, mask = images()
  variables = perturbed(create(overrides), x)
  found = []
  for form in (None, FORMS["both"]):
    model = create({**overrides, "drop_path_rate": 0.0}, form)
    with norms.running_statistics():
      found.append(jax.jit(functools.partial(model.apply, train=True))(
          variables, x, mask=mask))
  assert_near(found[1], found[0], 1e-5)
  evaluated = jax.jit(model.apply)(variables, x, mask=mask)
  assert_near(found[1], evaluated, 1e-6)


def test_every_turn_of_the_loop_is_counted():
  overrides = CASES["caformer"]
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  plain, scanned = (create({**overrides, "depths": (3, 2)}, form)
                    for form in (None, SCAN))
  variables = jax.eval_shape(plain.init, jax.random.key(0), x)
  assert cost.of_inputs(scanned, x) == cost.of_inputs(plain, x)
  assert cost.count_macs(scanned.apply, variables, x) == (
      cost.count_macs(plain.apply, variables, x))


class Noisy(nn.Module):
  """A mixer that draws for itself."""

  dim: int
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, mask=None, train=False):
    return nn.Dropout(0.5, deterministic=not train)(x)


def test_what_else_draws_is_recomputed_but_not_scanned():
  overrides = {"depths": (2,), "dims": (8,), "token_mixers": (Noisy,),
               "drop_rate": 0.2}
  x, _ = images()
  rngs = {"drop_path": jax.random.key(1), "dropout": jax.random.key(2)}
  found = []
  for form in (None, compiling.Compile(remat=("block",))):
    model = create(overrides, form)
    variables = perturbed(model, x)
    found.append(jax.jit(functools.partial(model.apply, train=True))(
        variables, x, rngs=rngs))
  assert_near(found[1], found[0], 1e-6)
  with pytest.raises(ValueError, match="scan: True is not for config"):
    create(overrides, SCAN)
  scanned = create({**overrides, "drop_rate": 0.0}, SCAN)
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    jax.eval_shape(functools.partial(scanned.apply, train=True), variables, x,
                   rngs=rngs)


@pytest.mark.parametrize("name,kwargs,says", [
    ("resnet18", {"scan": True}, "compile.scan: True is for models of the "
     "family metaformer, and resnet18 is resnet; nearest: False"),
    ("deit_small_patch16_224", {"remat": ("block",)}, "deit_small_patch16_224 "
     "is vit; nearest: ('none',)"),
    ("poolformer_s12", {"remat": ("block", "none")}, "has 2 values for 4 "
     "stages; nearest: ('block', 'none', 'none', 'none')"),
    ("poolformer_s12", {"remat": ()}, "has 0 values"),
    ("my_models:Net", {"scan": True}, "my_models:Net is a user's own")])
def test_what_a_model_cannot_have_is_refused(name, kwargs, says):
  with pytest.raises(ValueError) as caught:
    metaformer_jax.create_model(name, compile=compiling.Compile(**kwargs))
  assert says in str(caught.value)

"""What the kernels' grids cost, and that they fit and compile for a TPU."""

import functools
import math

import jax
import jax.numpy as jnp
import kernel_cases as cases
import pytest
from jax.extend import core as extend_core
from jax.sharding import SingleDeviceSharding

from metaformer_jax.kernels import (
    folding,
    grid,
    mlp,
    norms,
    pooling,
    sepconv,
)
from metaformer_jax.models import cost, registry, settings
from metaformer_jax.preflight import topologies


def stages(norm, image_size=224):
  """The stages of every MetaFormer with this norm: side, channels, mixers."""
  models = [registry.get_spec(name).settings for name in registry.list_models()]
  return sorted({
      (image_size // 4 >> i, *stage) for model in models
      if isinstance(model, settings.MetaFormer) and model.norm == norm
      for i, stage in enumerate(zip(model.dims, model.token_mixers))})


# Side, channels, norm.
STAGES = [(side, channels, norm) for norm in norms.NORMS
          for side, channels in sorted({s[:2] for s in stages(norm)})]
# Of separable convolutions in float32.
TOO_LARGE = (56, 96), (56, 128)


def pallas_calls(jaxpr):
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      yield eqn.params
    else:
      for inner in extend_core.jaxprs_in_params(eqn.params):
        yield from pallas_calls(getattr(inner, "jaxpr", inner))


def moved_bytes(call):
  """Walks over the grid: a block is moved when its index changes."""
  n_steps, = call["grid_mapping"].grid
  total = 0
  for mapping in call["grid_mapping"].block_mappings:
    index, before = mapping.index_map_jaxpr, None
    block = [b.block_size for b in mapping.block_shape]
    rows, lanes = (-(-n // tile) for n, tile in zip(block[-2:], (8, 128)))
    n_bytes = (math.prod(block[:-2]) * rows * lanes * 1024
               * mapping.array_aval.dtype.itemsize)
    for step in range(n_steps):
      place = jax.core.eval_jaxpr(index.jaxpr, index.consts, step)
      total += n_bytes * (place != before)
      before = place
  return total


def branches(shape, norm):
  """The branches as functions of (x, parameters), and the parameters."""
  channels = shape[-1]
  keep = jnp.ones(shape[0])
  star = norm == "layer_norm"
  mlp_branch = functools.partial(
      cases.mlp_kernel, norm=norm, activation="star_relu" if star else "gelu",
      interpret=False)
  found = [(lambda x, p: mlp_branch(x, keep, p),
            cases.parameters(channels, 4 * channels, star=star))]
  if norm == "group_norm":
    found.append((
        lambda x, p: cases.pooling_kernel(x, keep, p, 3, interpret=False),
        cases.pooling_parameters(channels)))
  else:
    found.append((
        lambda x, p: cases.sepconv_kernel(x, keep, p, interpret=False),
        cases.sepconv_parameters(channels, 2 * channels, 7)))
  return found


def gradient(branch):
  def both(x, dy, p):
    y, pull = jax.vjp(branch, x, p)
    return y, pull(dy)

  return both


@pytest.mark.parametrize("side,channels,norm,dtype", [
    *((*stage, jnp.bfloat16) for stage in STAGES[::4]),
    *(pytest.param(*stage, dtype, marks=pytest.mark.slow)
      for dtype in (jnp.bfloat16, jnp.float32) for stage in STAGES)])
def test_the_cost_is_what_the_grid_moves(side, channels, norm, dtype):
  x = jax.ShapeDtypeStruct((24, side, side, channels), dtype)
  for branch, p in branches(x.shape, norm):
    traced = jax.make_jaxpr(gradient(branch))(x, x, p)
    calls = list(pallas_calls(traced.jaxpr))
    if "taps" in p and dtype == jnp.float32 and (side, channels) in TOO_LARGE:
      assert not calls
      continue
    flops = flops_of_a_pixel(p)
    assert len(calls) == len(flops) == 2
    for call, of_a_pixel in zip(calls, flops):
      found = call["cost_estimate"]
      assert found.bytes_accessed == moved_bytes(call)
      assert found.bytes_accessed > 2 * x.size * x.dtype.itemsize
      assert found.flops == of_a_pixel * math.prod(x.shape[:3])


def flops_of_a_pixel(p):
  """Forward and backward, of the branch with these parameters.

  Backward: the hidden activations again, and two gradients of each product.
  """
  if "kernel1" not in p:
    return 0, 0
  channels, hidden = p["kernel1"].shape
  if "taps" not in p:
    return 4 * channels * hidden, 10 * channels * hidden
  # Whole tiles of hidden channels, backward twice again.
  hidden = -(-hidden // 128) * 128
  return tuple(2 * hidden * (n * channels + convolutions * 7**2)
               for n, convolutions in ((2, 1), (6, 3)))


def problems(norm, image_size, dtype):
  """{(branch, side, channels): what keeps it from a kernel}, if anything."""
  found = {}
  for side, channels, mixer in stages(norm, image_size):
    shape = (128, side, side, channels)
    for activation in ("gelu", "star_relu"):
      found["mlp", side, channels] = mlp.problem(
          shape, dtype, 4 * channels, activation, norm)
    if mixer == "pooling" and norm == "group_norm":
      found["pooling", side, channels] = pooling.problem(shape, dtype, 3)
    if mixer == "sepconv":
      found["sepconv", side, channels] = sepconv.problem(
          shape, dtype, 2 * channels, 7, "star_relu", norm)
  return {key: problem for key, problem in found.items() if problem}


@pytest.mark.parametrize("norm,image_size,dtype,large", [
    ("group_norm", 224, jnp.bfloat16, set()),
    ("group_norm", 224, jnp.float32, set()),
    ("layer_norm", 224, jnp.bfloat16, set()),
    ("layer_norm", 224, jnp.float32, {
        ("sepconv", *stage) for stage in TOO_LARGE}),
    # No published model has pooling at this size.
    ("group_norm", 384, jnp.bfloat16, {
        ("pooling", 96, 64), ("pooling", 96, 96), ("mlp", 96, 96)}),
    ("layer_norm", 384, jnp.bfloat16, {
        ("sepconv", 96, channels) for channels in (64, 96, 128)})])
def test_stages_of_metaformers_fit_but_for_large_images(norm, image_size, dtype,
                                                        large):
  found = problems(norm, image_size, dtype)
  assert all("VMEM" in problem for problem in found.values())
  assert set(found) == large


@pytest.mark.parametrize("side,channels,norm", STAGES)
def test_memory_is_counted(side, channels, norm):
  shape, dtype = (128, side, side, channels), jnp.bfloat16
  fold = mlp.fold_of(shape, norm)
  call = mlp.backward_call(fold, dtype, 4 * channels, norm)
  # At least two blocks of x, dy and dx, both kernels and their gradients; of
  # whole images also the gradient of the normalised images in float32.
  values = fold.rows * side * channels
  least = (3 * 2 * 2 + 4 * (norm == "group_norm")) * values
  least += (2 + 4) * 8 * channels**2
  assert least <= call.vmem_bytes() <= grid.VMEM
  blocks = fold.n_steps * call.inputs[1].block_bytes
  assert blocks == 2 * 128 * side * -(-side * channels // 128) * 128


def test_images_are_folded_and_unfolded():
  x = cases.images((3, 4, 5, 6), "float32")
  folded = folding.fold_images(x)
  assert folded.shape == (4, 3, 30)
  assert (folded[1, 2, 6 * 3 + 5] == x[2, 1, 3, 5]).all()
  assert (folding.unfold_images(folded, x.shape) == x).all()


def test_only_a_tpus_program_has_the_kernels():
  x = jax.ShapeDtypeStruct((8, 4, 4, 64), jnp.bfloat16)
  for branch, p in [pair for norm in norms.NORMS
                    for pair in branches(x.shape, norm)]:
    traced = jax.jit(gradient(branch)).trace(x, x, p)
    for platform, kernels in {"tpu": 2, "cpu": 0, "cuda": 0}.items():
      text = traced.lower(lowering_platforms=(platform,)).as_text()
      assert text.count("@tpu_custom_call") == kernels


def test_costs_are_counted_of_the_plain_form():
  x = jax.ShapeDtypeStruct((8, 4, 4, 64), jnp.bfloat16)
  (branch, p), _ = branches(x.shape, "group_norm")
  macs = cost.count_macs(branch, x, p)
  assert macs == cost.count_macs(lambda x, p: cases.mlp_modules(
      x, jnp.ones(8), p), x, p) == 2 * 8 * 4 * 4 * 64 * 256


@pytest.mark.slow
@pytest.mark.parametrize("side,channels,norm", STAGES)
def test_every_stage_compiles_for_a_v5e(side, channels, norm, monkeypatch):
  """With the VMEM that is counted as the kernels' limit."""
  for key, value in topologies.ENVIRONMENT.items():
    monkeypatch.setenv(key, value)
  device, = topologies.devices(topologies.parse("v5e-1"))
  placed = SingleDeviceSharding(device)
  shape = (16, side, side, channels)
  for branch, p in branches(shape, norm):
    x, p = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=placed),
        (jax.ShapeDtypeStruct(shape, jnp.bfloat16), p))
    compiled = jax.jit(gradient(branch)).lower(x, x, p).compile()
    assert compiled.as_text().count('"tpu_custom_call"') == 2

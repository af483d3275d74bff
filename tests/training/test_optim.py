"""Optimizers: equal to PyTorch's and timm's, and to plain numpy.

What PyTorch and timm gave is in files that tests/golden/make_optim.py makes.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optim_cases
import parity_cases
import pytest

import metaformer_jax
from metaformer_jax.config import schema
from metaformer_jax.convert import layouts
from metaformer_jax.training import optim

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
GROUPS = json.loads((GOLDEN / "groups.json").read_text())


def create(rate=optim_cases.RATE, **options):
  """The optimizer at a constant rate."""
  cfg = schema.Experiment(
      optim=schema.Optim(base_lr=rate, schedule="constant",
                             warmup_epochs=0.0, **options),
      train=schema.Train(batch_size=1024))
  return optim.create(cfg, 10, 10)[0]


def trajectory(tx, params, gradients):
  """{name: the parameter after each step}."""
  @jax.jit
  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  state, found = tx.init(params), {k: [] for k in params}
  for g in gradients:
    params, state = step(params, state, g)
    for k, v in params.items():
      found[k].append(np.asarray(v))
  return found


@pytest.mark.parametrize("case", optim_cases.OPTIMIZERS)
def test_steps_are_those_of_pytorch_and_timm(case):
  options = {"nesterov": False, **optim_cases.OPTIMIZERS[case]}
  found = trajectory(create(**options), optim_cases.parameters(),
                     optim_cases.gradients())
  with np.load(GOLDEN / "optim.npz") as want:
    for name, first in optim_cases.parameters().items():
      steps = want[f"{case}/{name}"]
      # Of an update; optax has 1 - beta^t to float32 only.
      size = np.abs(np.diff(steps, axis=0, prepend=first[None])).max()
      np.testing.assert_allclose(found[name], steps, rtol=1e-6,
                                 atol=1e-4 * size, err_msg=name)


def numpy_lamb(params, gradients, rate, decay, eps=1e-6, b1=0.9, b2=0.999):
  """Algorithm 2 of arXiv 1904.00962, with what timm adds to it."""
  params = {k: v.astype(np.float64) for k, v in params.items()}
  m = {k: np.zeros_like(v) for k, v in params.items()}
  v = {k: np.zeros_like(v) for k, v in params.items()}
  for t, g in enumerate(gradients, 1):
    norm = np.sqrt(sum(np.square(x, dtype=np.float64).sum()
                       for x in g.values()))
    for k, x in params.items():
      clipped = g[k] / max(norm, 1.0)
      m[k] = b1 * m[k] + (1 - b1) * clipped
      v[k] = b2 * v[k] + (1 - b2) * clipped**2
      r = m[k] / (1 - b1**t) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
      ratio = 1.0
      if x.ndim > 1:
        r = r + decay * x
        norms = np.linalg.norm(x), np.linalg.norm(r)
        ratio = norms[0] / norms[1] if min(norms) > 0 else 1.0
      params[k] = x - rate * ratio * r
  return params


def test_lamb_by_its_definition():
  gradients = optim_cases.gradients()
  found = trajectory(create(name="lamb", weight_decay=0.1),
                     optim_cases.parameters(), gradients)
  want = numpy_lamb(optim_cases.parameters(), gradients, optim_cases.RATE, 0.1)
  for name, value in want.items():
    np.testing.assert_allclose(found[name][-1], value, rtol=2e-5, atol=1e-6)
  # A norm of 0 gives a ratio of 1; without a gradient only decay applies.
  assert np.any(found["zero"][0] != 0)
  # timm takes the norm of its decay too: a ratio of 1 / decay.
  idle = optim_cases.parameters()["idle"]
  np.testing.assert_allclose(found["idle"][0], idle * (1 - optim_cases.RATE),
                             rtol=1e-6)


def test_lamb_clips_at_1_unless_told():
  params = {"w": jnp.zeros((2,))}
  for clip_norm, eps, want in ((None, 1.0, 0.6 / 1.6), (0.1, 1.0, 0.06 / 1.06),
                               (100.0, 1.0, 3 / 4)):
    tx = create(name="lamb", eps=eps, rate=1.0, clip_norm=clip_norm)
    updates, _ = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params),
                           params)
    np.testing.assert_allclose(updates["w"][0], -want, rtol=1e-5)


def test_adamw_by_hand_with_clipping():
  tx = create(clip_norm=0.1, weight_decay=0.0, rate=1.0, eps=0.5)
  params = {"w": jnp.zeros((2,))}
  updates, _ = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params), params)
  clipped = np.array([3.0, 4.0]) * 0.1 / 5
  # The first step's corrected moments are the gradient and its square.
  np.testing.assert_allclose(updates["w"], -clipped / (clipped + 0.5),
                             rtol=1e-5)


def test_decay_spares_vectors_and_shrinks_matrices():
  params = {"kernel": jnp.full((2, 2), 4.0), "scale": jnp.full((2,), 4.0),
            "conv": jnp.full((1, 1, 2, 2), 4.0), "scalar": jnp.float32(4.0)}
  found = trajectory(create(weight_decay=0.5, rate=1.0), params,
                     [jax.tree.map(jnp.zeros_like, params)])
  for name, (value,) in found.items():
    # Decoupled: less learning rate * decay * parameter, at the rate of 1.
    want = 2.0 if name in ("kernel", "conv") else 4.0
    np.testing.assert_allclose(value, want, rtol=1e-6)


@pytest.mark.parametrize("name", ("adamw", "lamb", "sgd"))
def test_decay_of_all_parameters(name):
  """Without a gradient, nothing but the decay moves the parameters."""
  params = {"bias": jnp.full(3, 2.0), "kernel": jnp.full((3, 3), 2.0)}
  gradients = [jax.tree.map(jnp.zeros_like, params)]
  found = trajectory(create(rate=0.1, name=name, weight_decay=0.5,
                            momentum=0.0, decay_all=True), params, gradients)
  # LAMB scales the step to the norm of the parameter.
  decay = 1.0 if name == "lamb" else 0.5
  for (value,) in found.values():
    np.testing.assert_allclose(value, 2 * (1 - 0.1 * decay), rtol=1e-6)


def test_sgd_by_hand():
  params = {"w": np.full((1, 1), 2.0, np.float32)}
  gradients = [{"w": np.full((1, 1), g, np.float32)} for g in (1.0, -3.0)]
  for nesterov in (False, True):
    tx = create(name="sgd", rate=0.1, weight_decay=0.5, momentum=0.9,
                nesterov=nesterov)
    w, buffer = 2.0, 0.0
    for g, (found,) in zip((1.0, -3.0), zip(
        trajectory(tx, params, gradients)["w"])):
      coupled = g + 0.5 * w
      buffer = 0.9 * buffer + coupled
      w -= 0.1 * (coupled + 0.9 * buffer if nesterov else buffer)
      np.testing.assert_allclose(found, [[w]], rtol=1e-6)


def in_layout(case, values):
  """{key of the layout: the number that its parameter has in `values`}."""
  model = metaformer_jax.create_model(
      case.model, num_classes=case.num_classes, **case.overrides)
  size = metaformer_jax.get_spec(case.model).input_size
  params = jax.eval_shape(model.init, jax.random.key(0),
                          jnp.zeros((1, size, size, 3)))["params"]
  filled = jax.tree.map(
      lambda p, value: np.broadcast_to(np.float32(value), p.shape),
      params, values(params))
  found = layouts.to_torch(metaformer_jax.get_spec(case.model).family,
                           {"params": filled}, case.layout)
  assert all(x.min() == x.max() for x in found.values())
  return {k: int(x.max()) for k, x in found.items()}


@functools.cache
def trainable(name):
  state = parity_cases.Golden.load(GOLDEN / f"{name}.npz").state
  return [key for key, _, _, trained in state if trained]


@pytest.mark.parametrize("name", GROUPS)
def test_decays_what_timm_decays(name):
  want = dict(zip(trainable(name), GROUPS[name]["decayed"], strict=True))
  if name == "resmlp_12_224-timm":
    # timm's Affine has the shape [1, 1, C] and decays; the official one, with
    # which the models were trained, is a vector.
    want |= {k: 0 for k in want if k.endswith((".alpha", ".beta"))}
  assert in_layout(parity_cases.CASES[name], optim.decay_mask) == want
  assert 0 < sum(want.values()) < len(want)


@pytest.mark.parametrize(
    "name", [name for name in GROUPS if GROUPS[name]["layers"]])
def test_layers_are_those_of_timm(name):
  want = dict(zip(trainable(name), GROUPS[name]["layers"], strict=True))
  assert in_layout(parity_cases.CASES[name], optim.layer_numbers) == want


def test_layers_of_a_hybrid():
  """No published model covers it: a stage's start belongs to the block before.
  """
  numbers = in_layout(parity_cases.CASES["metaformer_pppa_s12_224-official"],
                      optim.layer_numbers)
  assert {numbers[k] for k in numbers if k.startswith("network.0.")} == {1}
  assert numbers["patch_embed.proj.weight"] == 0
  assert (numbers["network.5.proj.weight"] == numbers["network.6.pos_embed"]
          == numbers["network.4.1.norm1.weight"] == 4)
  assert numbers["network.7.0.token_mixer.qkv.weight"] == 5
  assert numbers["norm.weight"] == 5 and numbers["head.weight"] == 6


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_layer_decay_scales_the_rate(name):
  params = {"patch_embed": {"kernel": 0}, "block1": {"fc": {"kernel": 0}},
            "block2": {"fc": {"kernel": 0}}, "norm": {"scale": 0},
            "head": {"kernel": 0}}
  params = jax.tree.map(lambda _: jnp.full((2, 2), 2.0), params)
  gradients = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), params)
  plain, scaled = (
      tx.update(gradients, tx.init(params), params)[0]
      for tx in (create(name=name), create(name=name, layer_decay=0.5)))
  for where, power in (("patch_embed", 3), ("block1", 2), ("block2", 1),
                       ("norm", 1), ("head", 0)):
    for a, b in zip(jax.tree.leaves(plain[where]),
                    jax.tree.leaves(scaled[where])):
      assert np.all(a != 0)
      np.testing.assert_allclose(b, a * 0.5**power, rtol=1e-6)

"""Class activation maps: numpy heads, finite differences, pytorch-grad-cam."""

import functools
import pathlib

import cam_cases
import jax
import numpy as np
import numpy_layers as plain
import parity_cases
import pytest
from small_models import MODELS, drawn, images

import metaformer_jax
from metaformer_jax.convert import layouts
from metaformer_jax.models import activation_maps, compiling

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CLASSES = np.array([3, 1])


@functools.cache
def maps_of(name, layer=None):
  model, variables = drawn(name)
  maps = jax.jit(functools.partial(activation_maps.maps, model, layer=layer))(
      variables, images(), CLASSES)
  assert maps.dtype == np.float32
  return np.asarray(maps)


@functools.cache
def recorded(name):
  """Logits, features, the output of every module, parameters; float64."""
  model, variables = drawn(name)

  @jax.jit
  def run(variables, x):
    features = model.apply(variables, x, method="features")
    logits, state = model.apply(variables, x, capture_intermediates=True)
    return logits, features, state["intermediates"]

  return jax.tree.map(lambda v: np.asarray(v, np.float64), (
      *run(variables, images()), variables["params"]))


def attention(qkv, n_heads):
  """[N, 3 dim] -> [N, dim], before the projection."""
  q, k, v = (np.split(x, n_heads, axis=1) for x in np.split(qkv, 3, axis=1))
  heads = []
  for i in range(n_heads):
    weights = np.exp(q[i] @ k[i].T / q[i].shape[1] ** 0.5)
    heads.append(weights / weights.sum(1, keepdims=True) @ v[i])
  return np.concatenate(heads, 1)


def last_block(p, before, normed, n_heads):
  """A transformer block from the output of its first norm on; [N, dim]."""
  a = p["attn"]
  qkv = plain.dense(a["qkv"], normed) if "qkv" in a else np.concatenate(
      [plain.dense(a["q"], normed), plain.dense(a["kv"], normed)], axis=1)
  y = before + plain.dense(a["proj"], attention(qkv, n_heads))
  return y + plain.mlp(p["mlp"], plain.layer_norm(p["norm2"], y))


def features_and_head(name, i):
  """Features [h, w, dim] of image i; the function from them to the logits."""
  _, features, modules, p = recorded(name)
  stage = max(features)
  x = features[stage][i]

  def linear(y):
    return plain.dense(p["head"], y)

  if name == "poolformer_s12":
    def head(x):
      x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
      return linear((x * p["norm"]["scale"] + p["norm"]["bias"]).mean((0, 1)))
  elif name == "poolformerv2_s12":
    def head(x):
      return linear(plain.layer_norm(p["norm"], x.mean((0, 1))))
  elif name == "caformer_s18":
    def head(x):
      y = plain.layer_norm(p["norm"], x.mean((0, 1)))
      y = np.maximum(plain.dense(p["head"]["fc1"], y), 0)**2
      return plain.dense(p["head"]["fc2"],
                         plain.layer_norm(p["head"]["norm"], y, 1e-5))
  elif name == "resnet18":
    def head(x):
      return linear(x.mean((0, 1)))
  elif name == "mixer_b16_224":
    def head(x):
      return linear(plain.layer_norm(p["norm"], x).mean((0, 1)))
  elif name == "resmlp_12_224":
    def head(x):
      return linear((p["norm"]["alpha"] * x + p["norm"]["beta"]).mean((0, 1)))
  else:
    # With class tokens: before the attention of the last block.
    pvt = name == "pvt_tiny"
    if pvt:
      p, modules = {**p, **p["stage2"]}, modules["stage2"]
    (before,), (normed,) = (modules["block1"]["__call__"],
                            modules["block2"]["norm1"]["__call__"])
    before, normed = before[i], normed[i]
    n = len(normed) - x.shape[0] * x.shape[1]
    x = normed[n:].reshape(x.shape)

    def head(x):
      tokens = np.concatenate([normed[:n], x.reshape(-1, x.shape[-1])])
      y = last_block(p["block2"], before, tokens, n_heads=3)
      y = plain.layer_norm(p["norm"], y[:n])
      if pvt:
        return linear(y[0])
      return (linear(y[0]) + plain.dense(p["head_dist"], y[1])) / 2
  return x, head


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "poolformer_s12"))
    for name in MODELS])
def test_map_is_the_papers_with_alpha_by_finite_differences(name):
  """1e-4 of the largest: alpha of float64 heads in numpy."""
  maps, logits = maps_of(name), recorded(name)[0]
  for i, label in enumerate(CLASSES):
    x, head = features_and_head(name, i)
    np.testing.assert_allclose(head(x), logits[i], rtol=0, atol=1e-4)
    # Moving a channel at all pixels gives the sum of the pixels' gradients.
    step = 1e-5 * np.eye(x.shape[-1])
    alpha = np.array([(head(x + e) - head(x - e))[label] for e in step]) / 2e-5
    alpha /= x.shape[0] * x.shape[1]
    want = np.maximum(x @ alpha, 0)
    assert maps[i].shape == want.shape and want.max() > 0
    np.testing.assert_allclose(maps[i], want, rtol=0, atol=1e-4 * want.max())
    # The map of another class differs.
    other = np.maximum(x @ np.roll(alpha, 1), 0)
    assert abs(maps[i] - other).max() > 1e-2 * want.max()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_any_stage_by_the_gradient_of_a_bias(stage):
  """A bias of the stage's last MLP moves a channel at all pixels."""
  name = "poolformer_s12"
  model, variables = drawn(name)
  _, features, *_ = recorded(name)
  block = {"stage1": "block1", "stage2": "block2"}[stage]

  @jax.jit
  @jax.grad
  def gradient(params, x, label):
    return model.apply({"params": params}, x)[0, label]

  maps = maps_of(name, stage)
  for i, label in enumerate(CLASSES):
    found = gradient(variables["params"], images()[i:i + 1], label)
    found = found[stage][block]["mlp"]["fc2"]["bias"]
    scale = variables["params"][stage][block]["layer_scale2"]["scale"]
    x = features[stage][i]
    alpha = np.asarray(found / scale, np.float64) / (x.shape[0] * x.shape[1])
    want = np.maximum(x @ alpha, 0)
    np.testing.assert_allclose(maps[i], want, rtol=0, atol=1e-4 * want.max())


def test_default_is_the_predicted_class():
  model, variables = drawn("resnet18")
  logits = recorded("resnet18")[0]
  predicted = logits.argmax(-1)
  draw = jax.jit(functools.partial(activation_maps.maps, model))
  np.testing.assert_array_equal(
      draw(variables, images()), draw(variables, images(), predicted))


def test_features_in_bfloat16_give_nearly_the_same():
  want = maps_of("poolformer_s12")
  model, variables = drawn("poolformer_s12")
  model = model.clone(dtype=jax.numpy.bfloat16)
  maps = jax.jit(functools.partial(activation_maps.maps, model))(
      variables, images(), CLASSES)
  assert maps.dtype == np.float32
  np.testing.assert_allclose(maps, want, rtol=0, atol=0.1 * want.max())


@functools.cache
def original(case):
  """Our model with the weights of a case of `parity_cases`."""
  golden = parity_cases.Golden.load(GOLDEN / f"{case}.npz")
  case = parity_cases.CASES[case]
  model = metaformer_jax.create_model(
      case.model, num_classes=case.num_classes, **case.overrides)
  size = metaformer_jax.get_spec(case.model).input_size
  target = jax.eval_shape(model.init, jax.random.key(0),
                          np.zeros((1, size, size, 3), np.float32))
  return model, layouts.to_flax(
      metaformer_jax.get_spec(case.model).family,
      parity_cases.weights(golden.state_shapes, gain=case.gain), target)


@pytest.mark.parametrize("case,layer", [
    pytest.param(case, layer, marks=[pytest.mark.slow] * (
        layer != "stage4" or case.startswith("resnet18")))
    for case, layers in cam_cases.LAYERS.items() for layer in layers])
def test_maps_are_those_of_pytorch_grad_cam(case, layer):
  """Within 1e-3, before they are scaled in units of the largest value."""
  model, variables = original(case)
  x = cam_cases.images()

  @jax.jit
  def run(variables, x):
    where = activation_maps.find_layer(model, variables, x, layer)
    output = functools.partial(activation_maps._logits_and_features, model,
                               variables, x, where)
    _, gradient, features = jax.vjp(
        output, np.zeros(where.shape, np.float32), has_aux=True)
    found = {}
    for _, method, classes in calls:
      (g,) = gradient(jax.nn.one_hot(np.array(classes), model.num_classes))
      found[method, classes] = activation_maps.METHODS[method](features, g)
    return found

  calls = [call for call in cam_cases.calls(case) if call[0] == layer]
  found = run(variables, x)
  with np.load(GOLDEN / "cam.npz") as golden:
    for call in calls:
      key = cam_cases.key(case, *call)
      maps, want = np.asarray(found[call[1:]]), golden[f"{key}/map"]
      np.testing.assert_allclose(maps, want, rtol=0, atol=1e-3 * want.max())
      assert want.max() > 0
      scaled = activation_maps.scaled(maps, *cam_cases.SIZE)
      np.testing.assert_allclose(
          scaled[:, ::cam_cases.KEPT, ::cam_cases.KEPT],
          golden[f"{key}/scaled"], rtol=0, atol=1e-3)
      if call[1] == "eigencam":  # Of either sign.
        for one, signed in zip(maps, golden[f"{key}/signed"]):
          signs = [abs(np.maximum(sign * signed, 0) - one).max()
                   for sign in (1, -1)]
          assert min(signs) <= 1e-3 * one.max() < max(signs)


@pytest.mark.parametrize("case", cam_cases.LAYERS)
def test_maps_takes_classes_and_method(case):
  """What the command uses, against one golden call."""
  model, variables = original(case)
  call = ("stage4", "gradcam++", (7, 0))
  maps = jax.jit(functools.partial(activation_maps.maps, model,
                                   method="gradcam++"))(
      variables, cam_cases.images(), np.array([7, 0]))
  with np.load(GOLDEN / "cam.npz") as golden:
    want = golden[f"{cam_cases.key(case, *call)}/map"]
  np.testing.assert_allclose(maps, want, rtol=0, atol=1e-3 * want.max())


def test_eigen_cam_is_the_component_whose_peak_is_positive():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(4, 5, 6, 3))
  x[1] = -x[0]  # The same component, as the sign is ours.
  x[2] = x[2, :1, :1]  # The same everywhere.
  ramp = np.linspace(-1, 1, 30).reshape(5, 6, 1)
  x[3] = 7 + ramp * [1, 2, -2]  # Both ends are equally far from 0.
  maps = np.asarray(activation_maps.eigen_cam(x.astype(np.float32)))
  flat = x[0].reshape(30, 3) - x[0].reshape(30, 3).mean(0)
  values, vectors = np.linalg.eigh(flat.T @ flat)
  want = (flat @ vectors[:, values.argmax()]).reshape(5, 6)
  want *= np.sign(want.ravel()[abs(want).argmax()])
  np.testing.assert_allclose(maps[0], np.maximum(want, 0), atol=1e-5)
  np.testing.assert_allclose(maps[1], maps[0], atol=1e-5)
  np.testing.assert_allclose(maps[2], 0, atol=1e-6)
  either = [np.maximum(sign * 3 * ramp[..., 0], 0) for sign in (1, -1)]
  assert min(abs(maps[3] - one).max() for one in either) < 1e-5


def test_scaled_maps_fill_the_range_and_constant_ones_are_zero():
  maps = np.array([[[1.0, 3.0]], [[2.0, 2.0]], [[0.0, 0.0]]], np.float32)
  found = np.asarray(activation_maps.scaled(maps, 2, 4))
  np.testing.assert_allclose(found[0], [[0, 0.25, 0.75, 1]] * 2, atol=1e-6)
  np.testing.assert_array_equal(found[1:], 0)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (
        name not in ("poolformer_s12", "deit_base_distilled_patch16_224")))
    for name in MODELS])
def test_every_family_has_maps_of_gray_images(name):
  """Of the class's own gradient: layercam's are 0 only where all others are.

  Models with one output have maps of blocks by their path.
  """
  model, variables = drawn(name, channels=1)
  x = images(channels=1)
  layer = None if hasattr(model, "depths") else "block1"

  @jax.jit
  def run(variables, x):
    where = activation_maps.find_layer(model, variables, x, layer)
    _, gradient, features = jax.vjp(
        functools.partial(activation_maps._logits_and_features, model,
                          variables, x, where),
        np.zeros(where.shape, np.float32), has_aux=True)
    (g,) = gradient(jax.nn.one_hot(CLASSES, 5))
    return features, g, activation_maps.maps(
        model, variables, x, CLASSES, layer=layer, method="layercam")

  features, g, maps = map(np.asarray, run(variables, x))
  assert maps.shape == features.shape[:3] and maps.max() > 0
  want = np.maximum((np.maximum(g, 0) * features).sum(-1), 0)
  np.testing.assert_allclose(maps, want, atol=1e-5 * want.max())


def test_scanned_blocks_have_layers_of_their_own():
  model, variables = drawn("poolformer_s12")
  want = maps_of("poolformer_s12", "stage2/block2")
  scanned = model.clone(compile=compiling.Compile(scan=True))
  maps = jax.jit(functools.partial(activation_maps.maps, scanned,
                                   layer="stage2/block2"))(
      variables, images(), CLASSES)
  np.testing.assert_allclose(maps, want, atol=1e-6 * want.max())
  # The last block's output is the stage's.
  np.testing.assert_allclose(maps_of("poolformer_s12"), want)


@pytest.mark.parametrize("name,layer,message", [
    ("resnet18", "stage3", r"no layer 'stage3'.*mean stage"),
    ("resnet18", "stage2/block1/conv9", "did you mean stage2/block1/conv"),
    ("resnet18", "head", r"layer 'head', \[2, 5\], has no places"),
    ("mixer_b16_224", "block1/mlp_tokens/fc1", "has no places"),
])
def test_impossible_layers_are_refused(name, layer, message):
  model, variables = drawn(name)
  with pytest.raises(ValueError, match=message):
    activation_maps.find_layer(model, variables, images(), layer)


def test_impossible_maps_are_refused():
  model, variables = drawn("resnet18")
  headless = model.clone(num_classes=0)
  with pytest.raises(ValueError, match="without a head"):
    activation_maps.maps(headless, variables, images())
  with pytest.raises(ValueError, match="no method 'gradcam3'; did you mean"):
    activation_maps.maps(model, variables, images(), method="gradcam3")
  eigen = jax.jit(functools.partial(activation_maps.maps, method="eigencam"),
                  static_argnums=0)
  np.testing.assert_allclose(eigen(headless, variables, images()),
                             eigen(model, variables, images()), atol=1e-5)

"""Equality with the PyTorch originals, by outputs that they gave once.

The weights are drawn by name on both sides (tests/parity_cases.py), so a golden
file holds outputs only; tests/golden/make.py makes it.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases
import pytest

import metaformer_jax
from metaformer_jax.convert import layouts

GOLDEN = pathlib.Path(__file__).parent / "golden"


def build(case, height, width):
  model = metaformer_jax.create_model(
      case.model, num_classes=case.num_classes, **case.overrides)
  image = jnp.zeros((1, height, width, 3))
  return model, jax.eval_shape(model.init, jax.random.key(0), image)


def compare(case, golden):
  """Checks logits, features and gradients of one case against its file."""
  spec = metaformer_jax.get_spec(case.model)
  tensors = parity_cases.weights(golden.state_shapes, gain=case.gain)
  model, target = build(case, *case.sizes[0])
  variables = layouts.to_flax(spec.family, tensors, target)
  back = layouts.to_torch(spec.family, variables, case.layout)
  assert back.keys() == tensors.keys()
  for key, want in tensors.items():
    assert back[key].dtype == want.dtype and np.array_equal(back[key], want)

  @jax.jit
  def run(variables, images):
    return (model.apply(variables, images),
            model.apply(variables, images, method="features"))

  for size in case.sizes:
    images = parity_cases.images(case.batch, *size)
    logits, features = run(variables, images)
    want = golden.logits[size]
    scale = np.abs(want).max()
    print(case.name, size, np.abs(logits - want).max() / scale)
    np.testing.assert_allclose(logits, want, atol=1e-5 * scale, rtol=0)
    assert features.keys() == golden.features[size].keys()
    for stage, summary in golden.features[size].items():
      assert features[stage].shape == tuple(golden.shapes[size][stage])
      np.testing.assert_allclose(
          parity_cases.summary(np.asarray(features[stage])), summary,
          atol=1e-4 * summary[1], rtol=0)


@pytest.mark.parametrize("case", parity_cases.SMALL, ids=lambda c: c.name)
def test_equals_the_original(case):
  compare(case, parity_cases.Golden.load(GOLDEN / f"{case.name}.npz"))

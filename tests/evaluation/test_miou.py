"""Mean IoU against plain NumPy, exact for any batches."""

import jax
import jax.numpy as jnp
import numpy as np
import plain_segmentation as plain
import pytest

from metaformer_jax.evaluation import miou

N = 6


def pairs(seed, n=11):
  """Label maps and predictions: class 4 is absent, class 5 only predicted."""
  rng = np.random.default_rng(seed)
  found = []
  for i in range(n):
    h, w = (1, 1) if not i else rng.integers(1, 12, 2)
    label = rng.choice([0, 1, 2, 3, 255], (h, w)).astype(np.uint8)
    guess = np.where(rng.random((h, w)) < 0.6, label % 200,
                     rng.choice([0, 1, 2, 3, 5], (h, w)))
    found.append((label, np.minimum(guess, 5).astype(np.uint8)))
  found[1][0][:] = 255
  return found


def measured(evaluator, pairs, batch_size):
  """Adds the pairs in batches, of which the last one is padded."""
  evaluator.reset()
  update = jax.jit(evaluator.statistics)
  for first in range(0, len(pairs), batch_size):
    batch = {"label": np.zeros((batch_size, 12, 12), np.uint8),
             "mask": np.zeros(batch_size, bool)}
    outputs = np.zeros((batch_size, 12, 12), np.uint8)
    for i, (label, guess) in enumerate(pairs[first:first + batch_size]):
      batch["label"][i] = 255
      h, w = label.shape
      batch["label"][i, :h, :w], outputs[i, :h, :w] = label, guess
      batch["mask"][i] = True
    evaluator.update(jax.device_get(update(outputs, batch)))
  return evaluator.result()


@pytest.mark.parametrize("seed", range(3))
def test_measures_do_not_depend_on_batches(seed):
  data = pairs(seed)
  evaluator = miou.MeanIoU(N)
  found = measured(evaluator, data, 1)
  assert found["n_examples"] == len(data)
  np.testing.assert_allclose(
      [found[k] for k in ("miou", "mean_accuracy", "pixel_accuracy")],
      plain.measures(data, N), rtol=1e-12)
  for batch_size in (2, 4, 16):
    assert measured(evaluator, data, batch_size) == found


def test_table():
  label = np.array([[0, 0, 1, 255]], np.uint8)
  guess = np.array([[0, 1, 1, 2]], np.uint8)
  evaluator = miou.MeanIoU(3, ("sky", "tree", "sea"))
  found = measured(evaluator, [(label, guess)], 1)
  assert evaluator.table() == [
      {"class": 0, "name": "sky", "iou": 0.5, "accuracy": 0.5, "pixels": 2},
      {"class": 1, "name": "tree", "iou": 0.5, "accuracy": 1.0, "pixels": 1},
      {"class": 2, "name": "sea", "iou": None, "accuracy": None, "pixels": 0}]
  assert found == {"miou": 0.5, "mean_accuracy": 0.75, "pixel_accuracy": 2 / 3,
                   "n_examples": 1}
  # Predicted, but nowhere the label: an IoU of 0, which counts.
  found = measured(evaluator, [(label[:, :3], guess[:, [0, 1, 3]])], 1)
  assert found["miou"] == pytest.approx(0.5 / 3)
  assert found["mean_accuracy"] == pytest.approx(0.25)


def test_nothing_counts():
  ignored = np.full((3, 3), 255, np.uint8)
  found = measured(miou.MeanIoU(3), [(ignored, ignored)], 1)
  assert all(np.isnan(found[k])
             for k in ("miou", "mean_accuracy", "pixel_accuracy"))


def test_counts_are_whole_numbers_beyond_float32():
  evaluator = miou.MeanIoU(2)
  for _ in range(3):
    evaluator.update({"confusion": np.array([[2**24 + 1, 0], [0, 0]]),
                      "n_examples": np.int32(1)})
  assert evaluator.table()[0]["pixels"] == 3 * (2**24 + 1)
  with pytest.raises(ValueError, match="2147483648 pixels is too large"):
    huge = jax.ShapeDtypeStruct((2**15, 2**8, 2**8), jnp.uint8)
    jax.eval_shape(evaluator.statistics, huge,
                   {"label": huge, "mask": jnp.ones(2**15, bool)})

"""Draws on the device against the host's; the same on any number of devices.
"""

import dataclasses
import math

import distributions
import image_files
import jax
import jax.numpy as jnp
import numpy as np
import preprocessing
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaformer_jax import errors
from metaformer_jax.config import policies, resolve, schema, tasks, typed
from metaformer_jax.data.augment import draw
from metaformer_jax.data.transforms import classification as transforms
from metaformer_jax.ops import augment
from metaformer_jax.tasks import auto_augment

RECIPE = "rand-m9-mstd0.5-inc1"
N = 4000


def alike(one, other):
  """Whether two samples of counts have one distribution: chi-square."""
  one, other = one.astype(float), other.astype(float)
  used = one + other > 0
  one, other = one[used], other[used]
  if len(one) < 2:
    return True
  k = math.sqrt(other.sum() / one.sum())
  statistic = ((k * one - other / k) ** 2 / (one + other)).sum()
  n = len(one) - 1
  return statistic < n + 4 * math.sqrt(2 * n)


def both(task):
  """[n, k] of numbers, arguments and filters: the device's and the host's."""
  drawn = jax.jit(lambda key: auto_augment.draw(key, N, task))(
      jax.random.key(0))
  device = [np.asarray(v) for v in drawn]
  rng = np.random.default_rng(0)
  host = [np.zeros_like(v) for v in device]
  for i in range(N):
    for j, op in enumerate(draw.draw(task, rng)):
      values = augment.NAMES.index(op.name), op.argument, op.filter == "bicubic"
      for array, value in zip(host, values):
        array[i, j] = value
  return device, host


@pytest.mark.parametrize("task", [
    tasks.Classification(auto_augment=RECIPE),
    pytest.param(tasks.Classification(
        auto_augment="rand-m12-n3-p0.7-mstd101-mmax9-inc1", color_jitter=0.4,
        train_interpolation="bicubic"), marks=pytest.mark.slow),
    tasks.Classification(auto_augment="3a", color_jitter=0.3),
    pytest.param(tasks.Classification(color_jitter=1.3),
                 marks=pytest.mark.slow)],
    ids=["recipe", "uniform", "three", "jitter"])
def test_draws_are_distributed_as_the_hosts(task):
  device, host = both(task)
  assert [v.shape for v in device] == [v.shape for v in host]
  n = len(augment.NAMES)
  applied = [(v[0] > 0).sum(1) for v in (device, host)]
  assert alike(*(np.bincount(v, minlength=9) for v in applied))
  # Pairs of operations; the host leaves none out in the middle.
  orders = [np.sort(v[0], 1) for v in (device, host)] if (
      task.auto_augment.startswith("rand")) else [device[0], host[0]]
  pairs = [np.bincount(v[:, -2] * n + v[:, -1], minlength=n * n)
           for v in orders]
  assert alike(*pairs)
  for number in range(1, n):
    ours, theirs = (v[1][v[0] == number] for v in (device, host))
    assert (len(ours) > 0) == (len(theirs) > 0)
    if len(ours):
      # Many are clipped to one magnitude, which float32 has an ulp beside.
      assert distributions.ks(ours.astype(float).round(5),
                              theirs.astype(float).round(5)) < 1, number
  ours, theirs = (v[2][v[0] > 0].astype(int) for v in (device, host))
  if task.auto_augment.startswith("rand"):
    assert alike(*(np.bincount(v, minlength=2) for v in (ours, theirs)))


@pytest.mark.parametrize("name", policies.RAND_OPS)
def test_arguments_of_whole_magnitudes_are_the_hosts(name):
  """Where float32 could cut a whole number to the one below."""
  rng = np.random.default_rng(0)
  for magnitude in range(31):
    found = [float(auto_augment.argument(name, jnp.float32(magnitude),
                                         jnp.float32(sign)))
             for sign in (1, -1)]
    want = draw.argument(name, magnitude, rng)
    assert min(abs(want - v) for v in found) < 1e-5, magnitude


def test_no_augmentation_draws_nothing():
  assert auto_augment.draw(jax.random.key(0), 4, tasks.Classification()) is None


def test_each_device_applies_what_was_drawn_to_its_own_images():
  images = np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3), np.uint8)
  task = tasks.Classification(auto_augment="rand-m9-mstd0.5-p1-inc1")

  @jax.jit
  def run(images, key):
    drawn = auto_augment.draw(key, len(images), task)
    return auto_augment.apply(images, drawn, (1, 2, 3))

  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
  split = jax.device_put(images, NamedSharding(
      mesh, PartitionSpec(("data", "fsdp"))))
  key = jax.device_put(jax.random.key(0), NamedSharding(mesh, PartitionSpec()))
  program = run.lower(split, key).compile()
  got = program(split, key)
  np.testing.assert_array_equal(got, run(images, jax.random.key(0)))
  assert (np.asarray(got) != images).any(axis=(1, 2, 3)).sum() > 10
  # No device is sent another's images.
  text = program.as_text()
  assert "u8[16,12,12,3]" not in text and "u8[2,12,12,3]" in text


def test_the_host_leaves_to_the_device_what_it_does():
  task = tasks.Classification(image_size=24, auto_augment=RECIPE,
                              color_jitter=0.4)
  record = {"label": 3, "image": image_files.encode(
      np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))}

  def made(augment_on, task):
    transform = preprocessing.made(
        transforms.TrainTransform, schema.Data(augment_on=augment_on), task)
    return [transform(record, np.random.default_rng(i))["image"]
            for i in range(8)]

  plain = dataclasses.replace(task, auto_augment="", color_jitter=0.0)
  np.testing.assert_array_equal(made("device", task), made("host", plain))
  assert (np.array(made("host", task)) != made("host", plain)).any()


@pytest.mark.parametrize("changes, line", [
    ({"task.name": "segmentation", "data.source": "scenes"},
     "config.data.augment_on: device is not for config.task.name=segmentation"),
    ({"task.image_size": 8192},
     f"config.task.image_size: 8192 is above {augment.MAX_SIDE}, the largest "
     "for config.data.augment_on=device")], ids=["task", "size"])
def test_where_it_cannot_be_is_a_line(changes, line):
  wrong = typed.default(changes.get("task.name", "classification"))
  wrong.model.name = "poolformer_s12"
  wrong.data.augment_on = "device"
  for key, value in changes.items():
    wrong.update_from_flattened_dict({key: value})
  with pytest.raises(errors.ConfigError) as caught:
    resolve.resolve(wrong)
  assert line in str(caught.value)

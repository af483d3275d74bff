"""The canvases that evaluation images are padded to."""

import dataclasses

import numpy as np
import pytest
import segmentation_cases as cases

from metaformer_jax.config import schema
from metaformer_jax.config.tasks import segmentation as section
from metaformer_jax.data.transforms import framing, segmentation

TASK = section.Segmentation(
    num_classes=150, reduce_zero_label=True, scale=cases.SCALE)
DATA = schema.Data()


def task(**changes):
  return dataclasses.replace(TASK, **changes)


def padding(sizes, chosen, made):
  """Pixels of all canvases, each image on the one that it goes to."""
  groups = segmentation.EvalTransform(DATA, made, chosen).groups(sizes)
  assert sorted(np.concatenate(groups).tolist()) == list(range(len(sizes)))
  return sum(len(group) * framing.area(canvas)
             for group, canvas in zip(groups, chosen))


def test_every_image_fits_and_more_canvases_pad_less():
  rng = np.random.default_rng(0)
  sizes = np.append(rng.integers(20, 100, (200, 2)), [(1, 300), (300, 1)], 0)
  totals = []
  for n in (1, 2, 3, 4, 8, 64):
    made = task(eval_canvases=n)
    chosen = framing.choose(sizes, made)
    assert len(chosen) <= n
    for canvas in chosen:
      assert not any(side % 32 for size in (*canvas.images, canvas.labels)
                     for side in size)
    transform = segmentation.EvalTransform(DATA, made, chosen)
    for group, canvas in zip(transform.groups(sizes), chosen):
      for height, width in sizes[group].tolist():
        assert framing.fits(framing.needed(height, width, made), canvas)
    totals.append(padding(sizes, chosen, made))
  assert totals == sorted(totals, reverse=True)
  least = sum(framing.area(framing.needed(h, w, TASK))
              for h, w in sizes.tolist())
  assert totals[-1] < 1.1 * least and totals[3] < 0.7 * totals[0]


def test_few_sizes_get_the_best_canvases():
  """Against all ways to divide six sizes into two groups."""
  sizes = np.array([(32, 48)] * 5 + [(48, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)]
                   + [(40, 96)] * 3 + [(96, 40)])
  made = task(eval_canvases=2)
  kinds, n = np.unique(sizes, axis=0, return_counts=True)
  needed = [framing.needed(h, w, made) for h, w in kinds.tolist()]

  def cost(part):
    if not part:
      return 0
    joined = [tuple(max(needed[i].images[0][k] for i in part) for k in (0, 1)),
              tuple(max(needed[i].labels[k] for i in part) for k in (0, 1))]
    return sum(n[i] for i in part) * sum(h * w for h, w in joined)

  best = min(cost([i for i in range(len(kinds)) if bits >> i & 1])
             + cost([i for i in range(len(kinds)) if not bits >> i & 1])
             for bits in range(2 ** len(kinds)))
  assert padding(sizes, framing.choose(sizes, made), made) == best


def test_canvases_do_not_depend_on_the_order():
  rng = np.random.default_rng(1)
  sizes = rng.integers(16, 900, (3000, 2))
  chosen = framing.choose(sizes, TASK)
  assert chosen == framing.choose(sizes[rng.permutation(3000)], TASK)
  assert len(chosen) == TASK.eval_canvases


def test_images_of_unknown_size_are_in_the_largest_group():
  sizes = np.array([(32, 48), (0, 0), (64, 32), (0, 0)])
  chosen = framing.choose(sizes, TASK)
  assert [framing.area(c) for c in chosen] == sorted(map(framing.area, chosen))
  groups = segmentation.EvalTransform(DATA, TASK, chosen).groups(sizes)
  assert {1, 3} <= set(groups[-1].tolist())
  nothing = np.zeros((3, 2), int)
  only, = framing.choose(nothing, TASK)
  groups = segmentation.EvalTransform(DATA, TASK, (only,)).groups(nothing)
  assert groups[0].tolist() == [0, 1, 2]


def test_a_blank_example_is_like_those_of_its_group():
  made = task(eval_scales=(1.0, 0.5))
  sizes = np.array([(33, 47), (64, 32)])
  transform = segmentation.EvalTransform(DATA, made, framing.choose(sizes,
                                                                    made))
  for i, (height, width) in enumerate(sizes.tolist()):
    image, labels = cases.picture(cases.Case(height, width))
    group = transform.canvas_of(height, width)
    example = transform({"image": image, "label": labels, "group": group})
    blank = transform.blank(group)
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {
        k: (v.shape, v.dtype) for k, v in example.items()}, i
    assert (blank["label"] == 255).all() and blank["size"].all()


def test_an_image_larger_than_its_header_said_is_an_error():
  sizes = np.array([(32, 32), (32, 96)])
  transform = segmentation.EvalTransform(DATA, TASK,
                                         framing.choose(sizes, TASK))
  image, labels = cases.picture(cases.Case(32, 96))
  with pytest.raises(ValueError, match="not what its header said"):
    transform({"image": image, "label": labels, "group": 0})
  with pytest.raises(ValueError, match="fits into none of the canvases"):
    transform.canvas_of(400, 400)

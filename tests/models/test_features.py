"""The geometry of `features`: strides, channels, sizes and masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaformer_jax

MUCH_PADDING = "a stem of much padding"
MODELS = {
    "poolformer_s12": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    MUCH_PADDING: {
        "name": "poolformer_s12", "dims": (8, 8), "depths": (1, 1),
        "token_mixers": ("pooling",) * 2, "in_patch_size": 2, "in_pad": 2},
    "resnet18": {"widths": (8, 8, 8, 8)},
    "resnet50": {"widths": (8, 8, 8, 8), "stem": "3x3"},
    "pvt_tiny": {"dims": (8, 8, 10, 8), "class_token": False},
    "vit_base_patch16_224": {"dim": 12, "depth": 1},
}
SIZES = ((61, 50), (33, 75), (64, 96))
# One or two pixels of the first stage; an error for some models.
SMALL = ((1, 7), (8, 5))
NEED_32 = ("pvt_tiny", "vit_base_patch16_224")


def create(case, **kwargs):
  settings = {"name": case, **MODELS[case], **kwargs}
  return metaformer_jax.create_model(settings.pop("name"), num_classes=0,
                                     **settings)


@functools.cache
def shapes_of(case, height, width):
  """Shapes of the features of an image alone."""
  model, image = create(case), jnp.zeros((1, 96, 96, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  return {k: v.shape for k, v in jax.eval_shape(
      functools.partial(model.apply, method="features"), variables,
      jnp.zeros((1, height, width, 3))).items()}


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=[pytest.mark.slow] * (
        case in ("resnet18", "resnet50", "pvt_tiny"))) for case in MODELS])
def test_masks_are_what_the_images_alone_have(case):
  sizes = SIZES if case in NEED_32 else (*SIZES, *SMALL)
  mask = np.zeros((len(sizes), 96, 128), bool)
  for i, (height, width) in enumerate(sizes):
    mask[i, :height, :width] = True
  masks = create(case).feature_masks(mask)
  for i, size in enumerate(sizes):
    alone = shapes_of(case, *size)
    assert masks.keys() == alone.keys()
    for stage, (_, h, w, _) in alone.items():
      want = np.zeros(masks[stage].shape[1:], bool)
      want[:h, :w] = True
      np.testing.assert_array_equal(masks[stage][i], want, err_msg=stage)


@pytest.mark.parametrize("case", [c for c in MODELS if c != MUCH_PADDING])
def test_info_has_the_strides_and_channels(case):
  assert create(case).feature_info() == {
      stage: (64 // height, dim)
      for stage, (_, height, _, dim) in shapes_of(case, 64, 96).items()}


def test_without_padding_there_are_no_masks():
  assert create("poolformer_s12").feature_masks(None) == dict.fromkeys(
      f"stage{i}" for i in range(1, 5))

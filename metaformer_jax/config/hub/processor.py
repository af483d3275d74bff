"""The preprocessor_config.json of transformers, and our preprocessing.

Ours resizes the shorter side to floor(image_size / crop_pct), then takes the
centre; PoolFormerImageProcessor does the same.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from metaformer_jax.config import conversion
from metaformer_jax.config.schema import Experiment

log = logging.getLogger(__name__)

# Pillow's numbers of filters.
_FILTERS = {2: "bilinear", 3: "bicubic"}

# Steps that ours always or never has.
_STEPS = {"do_resize": True, "do_rescale": True, "do_pad": False,
          "do_flip_channel_order": False}


def crop_pct(crop: int, resized: int, published: Any = None) -> float:
  """A fraction of which floor(crop / fraction) is the resized side."""
  for found in (published, crop / resized, crop / (resized + 0.5)):
    if type(found) in (int, float) and found > 0 and (
        math.floor(crop / found) == resized):
      return float(found)
  return crop / resized


def read(content: Mapping[str, Any]) -> dict[str, Any]:
  """The sections "task" and "data" of a preprocessor_config.json.

  Args:
    content: of the file; keys that it omits are absent from the result.

  Raises:
    ValueError: what cannot be expressed, in one line.
  """
  for key, value in _STEPS.items():
    if content.get(key) not in (None, value):
      raise ValueError(f"{key}: {conversion.shown(content[key])} cannot be "
                       f"expressed here, only {value}")
  factor = content.get("rescale_factor", 1 / 255)
  if type(factor) not in (int, float) or abs(factor * 255 - 1) > 1e-3:
    raise ValueError(f"rescale_factor: {conversion.shown(factor)} cannot be "
                     "expressed here, only 1/255")
  task = _sizes(content)
  if content.get("resample") is not None:
    if content["resample"] not in [*_FILTERS]:
      raise ValueError(f"resample: {conversion.shown(content['resample'])} is "
                       "not 2, bilinear, or 3, bicubic")
    task["interpolation"] = _FILTERS[content["resample"]]
  if content.get("do_normalize") is False:
    return {"task": task, "data": {"mean": (0.0,) * 3, "std": (1.0,) * 3}}
  data = {}
  for key, theirs in (("mean", "image_mean"), ("std", "image_std")):
    value = content.get(theirs)
    if value is None:
      continue
    if not (isinstance(value, list) and len(value) == 3 and all(
        type(v) in (int, float) and 0 <= v <= 1 for v in value)) or (
            key == "std" and 0 in value):
      raise ValueError(f"{theirs}: {conversion.shown(value)} are not three "
                       "numbers in [0, 1]")
    data[key] = value
  return {"task": task, "data": data}


def _sizes(content: Mapping[str, Any]) -> dict[str, Any]:
  """Image size and crop, as far as the file has them."""
  if content.get("size") is None:
    return {}
  side = _side("size", content["size"])
  name = str(content.get("image_processor_type",
                         content.get("feature_extractor_type")))
  # A number alone is the shorter edge for some classes, both for the others.
  is_shortest = ("shortest_edge" in content["size"]
                 if isinstance(content["size"], dict)
                 else name.startswith(("PoolFormer", "ConvNext")))
  fraction = content.get("crop_pct")
  if name.startswith("ConvNext") and side >= 384:
    fraction, is_shortest = None, False
  resized = side
  if fraction is not None:
    if type(fraction) not in (int, float) or not 0 < fraction <= 1:
      raise ValueError(f"crop_pct: {conversion.shown(fraction)} is not above 0 "
                       "and at most 1")
    resized = int(side / fraction)
  crop = side
  if content.get("do_center_crop", True) and content.get("crop_size"):
    crop = _side("crop_size", content["crop_size"])
  if not is_shortest:
    log.info("images are resized at their shorter side and cropped; "
             "transformers' %s squeezes them into a square",
             name if name != "None" else "image processor")
  return {"image_size": crop, "crop_pct": crop_pct(crop, resized, fraction)}


def _side(key: str, value: Any) -> int:
  """The side of a square; ValueError if it is none."""
  sides = value
  if isinstance(value, dict):
    sides = value.get("shortest_edge", value.get("height"))
    if "shortest_edge" not in value and sides != value.get("width"):
      sides = None
  if type(sides) is not int or not 0 < sides < 2**31:
    raise ValueError(f"{key}: {conversion.shown(value)} is not the side of a "
                     "square")
  return sides


def write(cfg: Experiment) -> dict[str, Any]:
  """The preprocessor_config.json of a classifier."""
  task, data = cfg.task, cfg.data
  numbers = {name: number for number, name in _FILTERS.items()}
  side = task.image_size
  return {
      "image_processor_type": "PoolFormerImageProcessor", "do_resize": True,
      "size": {"shortest_edge": side}, "crop_pct": task.crop_pct,
      "resample": numbers[task.interpolation], "do_center_crop": True,
      "crop_size": {"height": side, "width": side}, "do_rescale": True,
      "rescale_factor": 1 / 255, "do_normalize": True,
      "image_mean": data.mean, "image_std": data.std}

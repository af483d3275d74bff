"""Parses `config.task.auto_augment`, which has timm's notation."""

import dataclasses
import functools
import math
import re

# The operations of RandAugment's "increasing" set: a higher magnitude changes
# the picture more (timm, rand_augment_transform with inc1).
RAND_OPS = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize",
    "solarize_add", "color", "contrast", "brightness", "sharpness", "shear_x",
    "shear_y", "translate_x", "translate_y")


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """n_ops operations, drawn with replacement, each applied with `prob`.

  Attributes:
    magnitude: strength of the operations, usually in [0, 10].
    std: of the normal noise added to the magnitude; infinite: the magnitude is
      uniform in [0, magnitude].
    limit: the noisy magnitude is clipped to [0, limit].
  """

  magnitude: float = 10.0
  n_ops: int = 2
  prob: float = 0.5
  std: float = 0.0
  limit: float = 10.0


@dataclasses.dataclass(frozen=True)
class ThreeAugment:
  """Grayscale, solarisation or blur (DeiT III, arXiv 2204.07118, section 3)."""


_KEYS = {"m": "magnitude", "n": "n_ops", "p": "prob", "mstd": "std",
         "mmax": "limit"}


@functools.cache
def parse(text: str) -> RandAugment | ThreeAugment | None:
  """Returns the policy of "rand-m9-mstd0.5-inc1", "3a", or "" for none.

  Raises:
    ValueError: the text is not a policy; the message continues "the text ...".
  """
  if not text:
    return None
  if text == "3a":
    return ThreeAugment()
  kind, *parts = text.split("-")
  if kind != "rand":
    raise ValueError("is neither 3a nor like rand-m9-mstd0.5-inc1")
  values = {}
  for part in parts:
    match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?|inf)", part)
    if not match or match[1] not in (*_KEYS, "inc") or match[1] in values:
      raise ValueError(f"has the part {part!r}; parts are one each of m9 n2 "
                       "p0.5 mstd0.5 mmax10 inc1")
    values[match[1]] = float(match[2])
  if values.pop("inc", 0) != 1:
    raise ValueError("has no inc1; only the increasing set is implemented")
  if not 0 <= values.get("p", 0.5) <= 1:
    raise ValueError("has a probability p above 1")
  for key in ("m", "n", "mmax"):  # Integers in timm, too.
    if values.get(key, 1) % 1 or values.get(key) == math.inf:
      raise ValueError(f"has a {key} that is not an integer")
  if values.get("mstd", 0) > 100:
    values["mstd"] = math.inf
  values = {_KEYS[key]: value for key, value in values.items()}
  return RandAugment(**values | {"n_ops": int(values.get("n_ops", 2))})

"""Cases of augmentation that are compared with timm and with Pillow.

`tests/golden/make_augment.py` runs them in timm, `test_pixels.py` here.
"""

import numpy as np
from image_files import encode
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

MEAN = (0.485, 0.456, 0.406)
FILTERS = ("bilinear", "bicubic")

# (our name, timm's name, arguments). STILL do not move pixels; MOVING do, and
# are run with each filter.
STILL = [
    ("auto_contrast", "AutoContrast", (0,)),
    ("equalize", "Equalize", (0,)),
    ("invert", "Invert", (0,)),
    ("posterize", "PosterizeIncreasing", (0, 1, 2, 4)),
    ("solarize", "SolarizeIncreasing", (0, 25, 128, 256)),
    ("solarize_add", "SolarizeAdd", (0, 50, 110, 128)),
    ("color", "ColorIncreasing", (0.0, 0.19, 1.0, 1.81)),
    ("contrast", "ContrastIncreasing", (0.1, 0.19, 1.81)),
    ("brightness", "BrightnessIncreasing", (0.1, 0.19, 1.81)),
    ("sharpness", "SharpnessIncreasing", (0.1, 0.19, 1.81)),
    ("blur", "GaussianBlur", (0.1, 0.7, 1.9)),
]
MOVING = [
    ("rotate", "Rotate", (-30.0, -1.0, 0.0, 26.3)),
    ("shear_x", "ShearX", (-0.3, 0.0, 0.27)),
    ("shear_y", "ShearY", (-0.27, 0.013, 0.3)),
    ("translate_x", "TranslateXRel", (-0.45, -0.011, 0.0, 0.4)),
    ("translate_y", "TranslateYRel", (-0.4, 0.25, 0.45)),
]


def pixel_cases():
  """Yields (key, our name, timm's name, argument, filter)."""
  for ours, timms, arguments in STILL:
    for value in arguments:
      yield f"{ours} {value}", ours, timms, value, "bilinear"
  for ours, timms, arguments in MOVING:
    for value in arguments:
      for name in FILTERS:
        yield f"{ours} {value} {name}", ours, timms, value, name


def picture() -> Image.Image:
  """44 x 36: a gradient, a grid, black and white corners, noise."""
  y, x = np.indices((36, 44))
  rng = np.random.default_rng(0)
  image = np.stack([x * 5, y * 6, (x * y) % 200 + 20], -1)
  image[::6] = image[:, ::7] = (240, 30, 90)
  image = image + rng.integers(-15, 16, image.shape)
  image[:8, :8], image[-8:, -8:] = 0, 255
  return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def odd_pictures():
  """Yields (name, array) of extreme sizes and contents."""
  rng = np.random.default_rng(2)
  for height, width in ((1, 1), (1, 9), (9, 1), (2, 2), (3, 3), (2, 5), (4, 3),
                        (31, 50), (64, 17)):
    yield f"noise {height}x{width}", rng.integers(
        0, 256, (height, width, 3), np.uint8)
  yield "flat", np.full((6, 7, 3), (0, 77, 255), np.uint8)
  yield "two values", rng.integers(100, 102, (20, 30, 3)).astype(np.uint8)
  # The step in equalize is 1, so its table exceeds 255.
  yield "dull", rng.integers(90, 130, (24, 19, 3)).astype(np.uint8)


def by_pillow(picture, name, value, kind, fill):
  """An operation by Pillow's own functions: the oracle of the kernels."""
  kind = Image.Resampling[kind.upper()]
  width, height = picture.size

  def affine(*matrix):
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix,
                             resample=kind, fillcolor=fill)

  enhance = {"color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast,
             "brightness": ImageEnhance.Brightness,
             "sharpness": ImageEnhance.Sharpness}
  if name in enhance:
    return enhance[name](picture).enhance(value)
  match name:
    case "auto_contrast":
      return ImageOps.autocontrast(picture)
    case "equalize":
      return ImageOps.equalize(picture)
    case "invert":
      return ImageOps.invert(picture)
    case "posterize":
      return ImageOps.posterize(picture, value)
    case "solarize":
      return ImageOps.solarize(picture, value)
    case "solarize_add":
      return picture.point(
          [i + value if i < 128 else i for i in range(256)] * 3)
    case "blur":
      return picture.filter(ImageFilter.GaussianBlur(value))
    case "rotate":
      return picture.rotate(value, kind, fillcolor=fill)
    case "shear_x":
      return affine(1, value, 0, 0, 1, 0)
    case "shear_y":
      return affine(1, 0, 0, value, 1, 0)
    case "translate_x":
      return affine(1, 0, value * width, 0, 1, 0)
    case "translate_y":
      return affine(1, 0, 0, 0, 1, value * height)
  raise ValueError(name)


def encoded_images() -> dict[str, bytes]:
  """Twenty files of odd sizes and modes."""
  rng = np.random.default_rng(1)

  def smooth(width, height, channels=3):
    small = rng.integers(0, 256, (5, 6, channels), np.uint8)
    return np.stack([
        Image.fromarray(small[..., c]).resize((width, height), 3)
        for c in range(channels)], -1)

  files = {}
  for width, height in ((41, 40), (40, 41), (36, 35), (35, 35), (53, 97),
                        (97, 53), (200, 11), (11, 200), (1, 1), (2, 3),
                        (320, 240)):
    files[f"rgb {width}x{height}"] = encode(
        Image.fromarray(smooth(width, height)), "JPEG", quality=92)
  gray = Image.fromarray(smooth(60, 45, 1)[..., 0])
  alpha = Image.fromarray(smooth(60, 45, 1)[..., 0])
  colour = Image.fromarray(smooth(61, 44))
  files["gray jpeg"] = encode(gray, "JPEG")
  files["gray png"] = encode(gray, "PNG")
  files["gray and alpha"] = encode(Image.merge("LA", (gray, alpha)), "PNG")
  files["palette"] = encode(colour.quantize(60), "PNG")
  files["transparent palette"] = encode(colour.quantize(60), "PNG",
                                      transparency=3)
  files["rgba"] = encode(Image.merge("RGBA", (*colour.split(),
                                            alpha.resize(colour.size))), "PNG")
  files["cmyk"] = encode(Image.fromarray(smooth(50, 37, 4), "CMYK"), "JPEG")
  files["bilevel"] = encode(gray.convert("1"), "PNG")
  files["16 bits"] = encode(Image.fromarray(
      np.asarray(gray).astype(np.uint16) * 257), "PNG")
  return files

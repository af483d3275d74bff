"""What is compared with timm's augmentation; read by both sides.

`tests/golden/make_augment.py` runs the cases in timm, the tests run them here.
"""

import io

import numpy as np
from PIL import Image

MEAN = (0.485, 0.456, 0.406)
FILTERS = ("bilinear", "bicubic")

# (our name, timm's name, arguments); those that move pixels with each filter.
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


def encoded_images() -> dict[str, bytes]:
  """Twenty files of odd sizes and modes."""
  rng = np.random.default_rng(1)

  def smooth(width, height, channels=3):
    small = rng.integers(0, 256, (5, 6, channels), np.uint8)
    return np.stack([
        Image.fromarray(small[..., c]).resize((width, height), 3)
        for c in range(channels)], -1)

  def save(picture, kind, **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()

  files = {}
  for width, height in ((41, 40), (40, 41), (36, 35), (35, 35), (53, 97),
                        (97, 53), (200, 11), (11, 200), (1, 1), (2, 3),
                        (320, 240)):
    files[f"rgb {width}x{height}"] = save(
        Image.fromarray(smooth(width, height)), "JPEG", quality=92)
  gray = Image.fromarray(smooth(60, 45, 1)[..., 0])
  alpha = Image.fromarray(smooth(60, 45, 1)[..., 0])
  colour = Image.fromarray(smooth(61, 44))
  files["gray jpeg"] = save(gray, "JPEG")
  files["gray png"] = save(gray, "PNG")
  files["gray and alpha"] = save(Image.merge("LA", (gray, alpha)), "PNG")
  files["palette"] = save(colour.quantize(60), "PNG")
  files["transparent palette"] = save(colour.quantize(60), "PNG",
                                      transparency=3)
  files["rgba"] = save(Image.merge("RGBA", (*colour.split(),
                                            alpha.resize(colour.size))), "PNG")
  files["cmyk"] = save(Image.fromarray(smooth(50, 37, 4), "CMYK"), "JPEG")
  files["bilevel"] = save(gray.convert("1"), "PNG")
  files["16 bits"] = save(Image.fromarray(
      np.asarray(gray).astype(np.uint16) * 257), "PNG")
  return files

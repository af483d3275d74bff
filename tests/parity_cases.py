"""Cases to compare with PyTorch: models, weights, images. No torch, no jax.

`golden/make.py` runs the cases in PyTorch and writes a file for each; the
tests run them here and compare with the files. Both sides draw weights and
images from this module, so that neither has to be stored.
"""

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

SEED = 0

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Case:
  """One model in one checkpoint layout.

  Attributes:
    name: of the case, and the stem of its files.
    model: our name of it.
    layout: of the state dict: "official", "timm" or "huggingface".
    oracle: whose code computes it: an official repository ("poolformer",
      "metaformer", "pvt", "deit"), "timm" or "huggingface".
    entry: what the oracle calls it.
    sizes: of the images, (height, width); the gradient is taken at the first.
    overrides: arguments of our `create_model`. The oracle cuts its stages to
      "depths", or its one stack of blocks to "depth".
    num_classes: of the head.
    batch: images of each size.
    gain: of `weights`.
  """

  name: str
  model: str
  layout: str
  oracle: str
  entry: str
  sizes: tuple[Size, ...]
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  num_classes: int = 1000
  batch: int = 1
  gain: float = 1.0


NATIVE = ((224, 224),)
# Strides of 4 to 32 leave a remainder in the second.
ANY_SMALL = ((64, 64), (75, 93))
# Position embeddings are resampled at the second, which 16 divides.
PATCHES_SMALL = ((224, 224), (96, 128))
ANY_FULL = ((224, 224), (192, 256), (160, 160))

_DEPTHS = {"depths": (1, 1, 2, 1)}
_DEPTH = {"depth": 2}
_POOL_THEN_NORM = {"head_norm_first": False}

# model, layout, oracle, entry (None: as our name), sizes, overrides
_SMALL_ROWS = (
    ("poolformer_s12", "official", "poolformer", None, ANY_SMALL, _DEPTHS),
    ("poolformer_s12", "timm", "timm", None, ANY_SMALL,
     {**_DEPTHS, **_POOL_THEN_NORM}),
    ("poolformer_s12", "huggingface", "huggingface", None, ANY_SMALL, _DEPTHS),
    ("metaformer_id_s12", "official", "poolformer", None, ANY_SMALL, _DEPTHS),
    ("metaformer_pppa_s12_224", "official", "poolformer", None, NATIVE,
     _DEPTHS),
    ("metaformer_ppaa_s12_224", "official", "poolformer", None, NATIVE,
     _DEPTHS),
    ("metaformer_pppf_s12_224", "official", "poolformer", None, NATIVE,
     _DEPTHS),
    ("metaformer_ppff_s12_224", "official", "poolformer", None, NATIVE,
     _DEPTHS),
    ("identityformer_s12", "official", "metaformer", None, ANY_SMALL, _DEPTHS),
    ("randformer_s12", "official", "metaformer", None, NATIVE, _DEPTHS),
    ("poolformerv2_s12", "official", "metaformer", None, ANY_SMALL, _DEPTHS),
    ("poolformerv2_s12", "timm", "timm", None, ANY_SMALL, _DEPTHS),
    ("convformer_s18", "official", "metaformer", None, ANY_SMALL, _DEPTHS),
    ("convformer_s18", "timm", "timm", None, ANY_SMALL, _DEPTHS),
    ("caformer_s18", "official", "metaformer", None, ANY_SMALL, _DEPTHS),
    ("caformer_s18", "timm", "timm", None, ANY_SMALL, _DEPTHS),
    ("resnet18", "timm", "timm", None, ANY_SMALL, _DEPTHS),
    ("resnet50", "timm", "timm", None, ANY_SMALL, _DEPTHS),
    ("vit_base_patch16_224", "timm", "timm", None, PATCHES_SMALL, _DEPTH),
    ("deit_small_patch16_224", "timm", "timm", None, PATCHES_SMALL, _DEPTH),
    ("deit_small_distilled_patch16_224", "timm", "timm", None, PATCHES_SMALL,
     _DEPTH),
    ("mixer_b16_224", "timm", "timm", None, NATIVE, _DEPTH),
    ("resmlp_12_224", "timm", "timm", None, NATIVE, _DEPTH),
    ("resmlp_12_224", "official", "deit", "resmlp_12", NATIVE, _DEPTH),
    ("pvt_tiny", "official", "pvt", None,
     (*ANY_SMALL, (224, 224)), _DEPTHS),
)

# Rows that together use every norm of the models.
_EPS = (
    "poolformer_s12-official", "poolformer_s12-timm",
    "metaformer_ppaa_s12_224-official", "identityformer_s12-official",
    "convformer_s18-official", "resnet50-timm", "vit_base_patch16_224-timm",
    "mixer_b16_224-timm", "pvt_tiny-official",
)

_SIZES_S = ("s12", "s24", "s36", "m36", "m48")
_SIZES_C = ("s18", "s36", "m36", "b36")


def _full_rows():
  """Yields model, layout, oracle, entry, sizes, overrides, classes."""
  for size in _SIZES_S:
    yield f"poolformer_{size}", "official", "poolformer", None, ANY_FULL
  yield ("poolformer_s12", "timm", "timm", None, ANY_FULL, _POOL_THEN_NORM)
  yield "poolformer_s12", "huggingface", "huggingface", None, ANY_FULL
  yield "metaformer_id_s12", "official", "poolformer", None, ANY_FULL
  for mixers in ("pppa", "ppaa", "pppf", "ppff"):
    yield (f"metaformer_{mixers}_s12_224", "official", "poolformer", None,
           NATIVE)
  for family, sizes in (("identityformer", ANY_FULL), ("randformer", NATIVE),
                        ("poolformerv2", ANY_FULL)):
    for size in _SIZES_S:
      yield f"{family}_{size}", "official", "metaformer", None, sizes
  yield "poolformerv2_s12", "timm", "timm", None, ANY_FULL
  for family in ("convformer", "caformer"):
    for size in _SIZES_C:
      yield f"{family}_{size}", "official", "metaformer", None, ANY_FULL
    yield f"{family}_s18", "timm", "timm", None, ANY_FULL
    yield (f"{family}_s18_384", "official", "metaformer", None, ((384, 384),))
    yield (f"{family}_s18_in21k", "official", "metaformer", None, NATIVE, {},
           21841)
  for n in (18, 34, 50, 101, 152):
    yield f"resnet{n}", "timm", "timm", None, ANY_FULL
  for name in ("vit_base", "deit_small", "deit_base", "deit_small_distilled",
               "deit_base_distilled"):
    yield f"{name}_patch16_224", "timm", "timm", None, ANY_FULL
  yield "mixer_b16_224", "timm", "timm", None, NATIVE
  for ours, theirs in (("resmlp_12_224", "resmlp_12"),
                       ("resmlp_24_224", "resmlp_24"),
                       ("resmlp_big_24_224", "resmlpB_24")):
    yield ours, "timm", "timm", None, NATIVE
    yield ours, "official", "deit", theirs, NATIVE
  for size in ("tiny", "small", "medium", "large"):
    yield f"pvt_{size}", "official", "pvt", None, ANY_FULL


def _case(suffix, model, layout, oracle, entry, sizes, overrides=None,
          num_classes=1000, batch=1):
  return Case(f"{model}-{layout}{suffix}", model, layout, oracle,
              entry or model, sizes, overrides or {}, num_classes, batch)


_PLAIN = tuple(_case("", *row, num_classes=10, batch=2) for row in _SMALL_ROWS)
# With values so small that the norms' epsilons matter.
SMALL = _PLAIN + tuple(
    dataclasses.replace(case, name=f"{case.name}-eps", sizes=case.sizes[:1],
                        gain=0.01)
    for case in _PLAIN if case.name in _EPS)
FULL = tuple(_case("-full", *row) for row in _full_rows())
CASES = {case.name: case for case in (*SMALL, *FULL)}


def _around(centre, spread):
  """Draws uniform in centre +- spread."""
  return lambda rng, shape: centre + spread * (
      2 * rng.random(shape, np.float32) - 1)


def _normal(std):
  return lambda rng, shape: std * rng.standard_normal(shape, np.float32)


def _kernel(rng, shape):
  """Normal, [out, in, ...], with a deviation that keeps the variance."""
  return _normal(math.prod(shape[1:]) ** -0.5)(rng, shape)


def _mixing(rng, shape):
  """Rows that add up to 1: the softmax of uniform draws."""
  weight = np.exp(rng.random(shape))
  return weight / weight.sum(-1, keepdims=True)


# The first pattern that matches the end of a key gives its distribution and the
# power of the gain. A weight with two or more axes is called a kernel
# here. Every branch matters, and values stay near 1 in deep models.
_DRAWS = tuple((re.compile(rf"(^|\.){pattern}$"), power, draw)
               for pattern, power, draw in (
    (r"num_batches_tracked", 0, lambda rng, shape: np.full(shape, 7, np.int64)),
    (r"running_mean", 1, _normal(0.2)),
    (r"running_var", 2, _around(1, 0.5)),
    (r"random_matrix", 0, _mixing),
    (r"(pos_embed\d?|position_embeddings|(cls|dist|distillation)_token)", 1,
     _normal(0.2)),
    (r"(layer_scale_\d|layer_scale\d\.scale|gamma_\d|ls\d)", 1,
     _around(0.3, 0.1)),
    # A bottleneck's last norm, which alone bounds a ResNet's branches.
    (r"bn3\.weight", 0, _around(0.3, 0.1)),
    (r"(res_scale\d\.scale|act\d?\.scale|alpha|weight)", 0, _around(1, 0.2)),
    (r"(bias|beta)", 1, _normal(0.1)),
    (r"kernel", 1, _kernel),
))


def _rng(key, *seeds):
  return np.random.default_rng([zlib.crc32(key.encode()), *seeds])


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int = SEED,
            gain: float = 1.0) -> dict[str, np.ndarray]:
  """Draws a state dict: each tensor from its key, its shape and the seed.

  Args:
    shapes: of the tensors, by their keys in one of the layouts.
    seed: of all.
    gain: factor of kernels, biases, embeddings, LayerScale and running means;
      its square, of running variances.

  Returns:
    float32, but int64 for a counter of batches.

  Raises:
    ValueError: a key matches no pattern.
  """
  out = {}
  for key, shape in shapes.items():
    name = re.sub(r"weight$", "kernel", key) if len(shape) > 1 else key
    for pattern, power, draw in _DRAWS:
      if pattern.search(name):
        array = draw(_rng(key, seed), tuple(shape))
        out[key] = (array if array.dtype == np.int64
                    else (array * gain**power).astype(np.float32))
        break
    else:
      raise ValueError(f"no rule draws {key!r}")
  return out


def images(n: int, h: int, w: int, seed: int = SEED) -> np.ndarray:
  """Pixels [n, h, w, 3], float32, mean square near 1.

  Noise, to which each image adds its own colour and its own slopes along both
  axes: flipped, transposed or shifted images give other logits.
  """
  rng = _rng("images", n, h, w, seed)
  x = rng.standard_normal((n, h, w, 3))
  colour, down, right = rng.standard_normal((3, n, 1, 1, 3))
  x += colour + down * np.linspace(-1, 1, h).reshape(1, h, 1, 1)
  x += right * np.linspace(-1, 1, w).reshape(1, 1, w, 1)
  return (0.6 * x).astype(np.float32)


def labels(n: int, num_classes: int) -> np.ndarray:
  """0, 1, ...: the loss is the mean over the batch of the cross entropy."""
  return np.arange(n) % num_classes


def summary(features: np.ndarray, n_samples: int = 256) -> np.ndarray:
  """Mean, root mean square, and values at fixed indices [2 + n_samples].

  The indices, of the flat array, depend on its size alone.
  """
  x = np.asarray(features, np.float64).ravel()
  index = _rng("summary", x.size).integers(x.size, size=n_samples)
  return np.concatenate([[x.mean(), np.sqrt(np.square(x).mean())], x[index]])


def sketch(key: str, gradient: np.ndarray, n_signs: int = 2) -> np.ndarray:
  """Norm, and inner products with vectors of random signs [1 + n_signs].

  Args:
    key: in the state dict; it and the size choose the signs.
    gradient: in the state dict's layout, with its shape or flat.
    n_signs: number of vectors.
  """
  x = np.asarray(gradient, np.float64).ravel()
  out = [np.linalg.norm(x)]
  for i in range(n_signs):
    bits = np.frombuffer(_rng(key, i).bytes(-(-x.size // 8)), np.uint8)
    sign = 2 * np.unpackbits(bits, count=x.size).astype(np.int8) - 1
    out.append(sign @ x)
  return np.array(out)


@dataclasses.dataclass(frozen=True)
class Golden:
  """The outputs of the oracle for a case.

  Attributes:
    meta: seed, versions, and "n_params", the number of trainable values.
    state: (key, shape, dtype, trainable) of each tensor of the state dict.
    shapes: of the features, by size and stage, channel-last.
    logits: [batch, classes] by size.
    features: `summary` by size and stage ("stage1", ...; "stage4" alone of
      models with one stage), before any final norm, without prefix tokens.
    gradients: `sketch` by the keys of the trainable tensors, at the first
      size, of the model in evaluation mode.
  """

  meta: dict[str, Any]
  state: list[tuple[str, tuple[int, ...], str, bool]]
  shapes: dict[Size, dict[str, tuple[int, ...]]]
  logits: dict[Size, np.ndarray]
  features: dict[Size, dict[str, np.ndarray]]
  gradients: dict[str, np.ndarray]

  @property
  def state_shapes(self) -> dict[str, tuple[int, ...]]:
    """The argument of `weights`."""
    return {key: shape for key, shape, _, _ in self.state}

  def save(self, path) -> None:
    """Writes an .npz: "header" is JSON, the rest are float arrays."""
    arrays = {"gradients": np.array(list(self.gradients.values()))}
    shapes = {}
    for (h, w), logits in self.logits.items():
      arrays[f"logits/{h}x{w}"] = logits
      shapes[f"{h}x{w}"] = self.shapes[h, w]
      for stage, values in self.features[h, w].items():
        arrays[f"features/{h}x{w}/{stage}"] = values.astype(np.float32)
    header = {"meta": self.meta, "shapes": shapes, "state": self.state}
    np.savez_compressed(path, header=np.array(json.dumps(header)), **arrays)

  @classmethod
  def load(cls, path) -> "Golden":
    with np.load(path) as arrays:
      header = json.loads(str(arrays["header"]))
      state = [(k, tuple(s), d, t) for k, s, d, t in header["state"]]
      shapes, logits, features = {}, {}, {}
      for name, of_stages in header["shapes"].items():
        h, w = map(int, name.split("x"))
        shapes[h, w] = {k: tuple(v) for k, v in of_stages.items()}
        logits[h, w] = arrays[f"logits/{name}"]
        features[h, w] = {
            k: arrays[f"features/{name}/{k}"] for k in of_stages}
      trainable = [key for key, _, _, t in state if t]
      gradients = dict(zip(trainable, arrays["gradients"], strict=True))
    return cls(header["meta"], state, shapes, logits, features, gradients)

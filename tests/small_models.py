"""Small models of all families, and variables for them."""

import functools

import jax
import numpy as np
import numpy_layers as plain

import metaformer_jax

TWO_STAGES = {"depths": (1, 2), "dims": (8, 12),
              "token_mixers": ("pooling", "pooling"), "num_classes": 5}
# One for each kind of head.
MODELS = {
    "poolformer_s12": TWO_STAGES,
    "poolformerv2_s12": TWO_STAGES | {"res_scale_init": ()},
    "caformer_s18": TWO_STAGES | {"res_scale_init": ()},
    "resnet18": {"depths": (1, 1), "widths": (8, 12), "num_classes": 5},
    "pvt_tiny": {"depths": (1, 2), "dims": (8, 12), "n_heads": (1, 3),
                 "mlp_ratios": (2, 2), "sr_ratios": (2, 1), "num_classes": 5},
    "deit_base_distilled_patch16_224": {
        "patch_size": 8, "dim": 12, "depth": 2, "n_heads": 3, "num_classes": 5},
    "mixer_b16_224": {"patch_size": 8, "dim": 12, "depth": 2,
                      "num_classes": 5},
    "resmlp_12_224": {"patch_size": 8, "dim": 12, "depth": 2,
                      "num_classes": 5},
}


def create(name):
  return metaformer_jax.create_model(name, **MODELS[name])


def images(n=2, height=32, width=40, channels=3):
  return np.random.default_rng(1).normal(
      size=(n, height, width, channels)).astype(np.float32)


@functools.cache
def drawn(name, channels=3):
  """A model, and variables other than 0 and 1."""
  model = create(name)
  variables = plain.drawn(model, images(channels=channels))

  def positive(path, v):
    name = path[-1].key
    return abs(v).astype(np.float32) + 0.5 if name == "var" else v

  return model, jax.tree_util.tree_map_with_path(positive, variables)

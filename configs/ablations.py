r"""The ablation of PoolFormer-S12 (arXiv 2111.11418, table 5) on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/ablations.py:identity \
        --config.data.path=/path/to/imagenet
    python -m metaformer_jax.tools.study --config=configs/ablations.py \
        --workdir=runs/ablations --set data.path=/path/to/imagenet

The second command runs all variants. Each changes one thing in PoolFormer-S12.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import classification

SOURCE = "arXiv 2111.11418, table 5"

_P, _A, _F = "pooling", "attention", "spatial_fc"

# Hyper-parameters that differ, published top-1.
VARIANTS = {
    "baseline": ({}, 77.2),
    "identity": ({"token_mixers": ("identity",) * 4}, 74.3),
    "random": ({"token_mixers": ("random",) * 4}, 75.8),
    "depthwise_conv": ({"token_mixers": ("depthwise_conv",) * 4}, 78.1),
    "pool_5": ({"pool_size": 5}, 77.2),
    "pool_7": ({"pool_size": 7}, 77.1),
    "pool_9": ({"pool_size": 9}, 76.8),
    "layer_norm": ({"norm": "layer_norm"}, 76.5),
    "batch_norm": ({"norm": "batch_norm"}, 76.4),
    "no_norm": ({"norm": "none"}, 46.1),
    "relu": ({"activation": "relu"}, 76.4),
    "silu": ({"activation": "silu"}, 77.2),
    "no_residual": ({"residual": False}, 0.1),
    "no_mlp": ({"mlp_ratio": 0.0}, 5.7),
    "pppa": ({"token_mixers": (_P, _P, _P, _A), "norm": "layer_norm",
              "position_embeddings": (4,)}, 78.3),
    "ppaa": ({"token_mixers": (_P, _P, _A, _A), "norm": "layer_norm",
              "position_embeddings": (3,)}, 81.0),
    "pppf": ({"token_mixers": (_P, _P, _P, _F)}, 77.5),
    "ppff": ({"token_mixers": (_P, _P, _F, _F)}, 77.9),
    # Not in that table.
    "star_relu": ({"activation": "star_relu"}, None),
    "squared_relu": ({"activation": "squared_relu"}, None),
    "no_layer_scale": ({"layer_scale_init": 0.0}, None),
    "res_scale": ({"layer_scale_init": 0.0,
                   "res_scale_init": (0.0, 0.0, 1.0, 1.0)}, None),
    "no_subtraction": ({"pool_subtract": False}, None),
}

NOTES = dict.fromkeys(
    ("star_relu", "squared_relu", "no_layer_scale", "res_scale",
     "no_subtraction"),
    "not in the paper: from its sequel, arXiv 2210.13452, or from the issues "
    "of its repository")


def get_config(variant="baseline"):
  settings, _ = recipes.variant(VARIANTS, variant)
  # The paper trains the hybrids with attention with a batch of 1024 (appendix
  # A).
  has_attention = _A in settings.get("token_mixers", ())
  config = classification.poolformer(
      "poolformer_s12", batch_size=1024 if has_attention else 4096)
  config.model.update(settings)
  return config

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

# Settings that differ, published top-1. The paper trains the hybrids with
# attention with a batch of 1024 (appendix A).
VARIANTS = {
    "baseline": ({}, 77.2),
    "identity": ({"model.token_mixers": ("identity",) * 4}, 74.3),
    "random": ({"model.token_mixers": ("random",) * 4}, 75.8),
    "depthwise_conv": ({"model.token_mixers": ("depthwise_conv",) * 4}, 78.1),
    "pool_5": ({"model.pool_size": 5}, 77.2),
    "pool_7": ({"model.pool_size": 7}, 77.1),
    "pool_9": ({"model.pool_size": 9}, 76.8),
    "layer_norm": ({"model.norm": "layer_norm"}, 76.5),
    "batch_norm": ({"model.norm": "batch_norm"}, 76.4),
    "no_norm": ({"model.norm": "none"}, 46.1),
    "relu": ({"model.activation": "relu"}, 76.4),
    "silu": ({"model.activation": "silu"}, 77.2),
    "no_residual": ({"model.residual": False}, 0.1),
    "no_mlp": ({"model.mlp_ratio": 0.0}, 5.7),
    "pppa": ({"model.token_mixers": (_P, _P, _P, _A),
              "model.norm": "layer_norm", "model.position_embeddings": (4,),
              "train.batch_size": 1024}, 78.3),
    "ppaa": ({"model.token_mixers": (_P, _P, _A, _A),
              "model.norm": "layer_norm", "model.position_embeddings": (3,),
              "train.batch_size": 1024}, 81.0),
    "pppf": ({"model.token_mixers": (_P, _P, _P, _F)}, 77.5),
    "ppff": ({"model.token_mixers": (_P, _P, _F, _F)}, 77.9),
    # Not in that table.
    "star_relu": ({"model.activation": "star_relu"}, None),
    "squared_relu": ({"model.activation": "squared_relu"}, None),
    "no_layer_scale": ({"model.layer_scale_init": 0.0}, None),
    "res_scale": ({"model.layer_scale_init": 0.0,
                   "model.res_scale_init": (0.0, 0.0, 1.0, 1.0)}, None),
    "no_subtraction": ({"model.pool_subtract": False}, None),
}

NOTES = dict.fromkeys(
    ("star_relu", "squared_relu", "no_layer_scale", "res_scale",
     "no_subtraction"),
    "not in the paper: from its sequel, arXiv 2210.13452, or from the issues "
    "of its repository")


def get_config(variant="baseline"):
  settings, _ = recipes.variant(VARIANTS, variant)
  config = classification.poolformer("poolformer_s12", batch_size=4096)
  config.update_from_flattened_dict(settings)
  return config

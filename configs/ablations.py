"""The ablation of arXiv 2111.11418, table 5: one variant a name.

    python -m metaformer_jax.main --config=configs/ablations.py:identity \
        --config.data.path=/path/to/imagenet
    python -m metaformer_jax.tools.study --config=configs/ablations.py \
        --workdir=runs/ablations --set data.path=/path/to/imagenet

The second runs all of them; see `tools.study`. Each is PoolFormer-S12 with one
thing changed, trained by `recipes.poolformer`.
Hardware: as configs/poolformer_s12.py, for each variant.
Expected: the top-1 below, published; None where the paper has none.
"""

from metaformer_jax.recipes import classification as recipes

_P, _A, _F = "pooling", "attention", "spatial_fc"

# Name: what differs from the model, published top-1.
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
    # Not in the table: of the sequel, and of the official repository's issues.
    "star_relu": ({"activation": "star_relu"}, None),
    "squared_relu": ({"activation": "squared_relu"}, None),
    "no_layer_scale": ({"layer_scale_init": 0.0}, None),
    "res_scale": ({"layer_scale_init": 0.0,
                   "res_scale_init": (0.0, 0.0, 1.0, 1.0)}, None),
    "no_subtraction": ({"pool_subtract": False}, None),
}


def get_config(variant: str = "baseline"):
  settings, _ = VARIANTS[variant]
  config = recipes.poolformer("poolformer_s12")
  config.model.update(settings)
  if "attention" in settings.get("token_mixers", ()):
    config.train.batch_size = 1024  # As the paper's appendix A says.
  return config

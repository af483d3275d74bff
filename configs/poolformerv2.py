r"""PoolFormerV2 (arXiv 2210.13452) on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/poolformerv2.py:s12 \
        --config.data.path=/path/to/imagenet

Settings: scripts/poolformerv2/ of github.com/sail-sg/metaformer.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import classification

# Drop path, published top-1.
VARIANTS = {
    "s12": (0.1, 78.0),
    "s24": (0.1, 80.7),
    "s36": (0.2, 81.6),
    "m36": (0.3, 82.2),
    "m48": (0.4, 82.6),
}


def get_config(variant=None):
  drop_path, _ = recipes.variant(VARIANTS, variant)
  return classification.metaformer_baseline(
      f"poolformerv2_{variant}", drop_path_rate=drop_path)

r"""RandFormer (arXiv 2210.13452) on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/randformer.py:s12 \
        --config.data.path=/path/to/imagenet

Settings: scripts/randformer/ of github.com/sail-sg/metaformer.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import classification

# Drop path, published top-1.
VARIANTS = {
    "s12": (0.1, 76.6),
    "s24": (0.1, 78.2),
    "s36": (0.2, 79.5),
    "m36": (0.3, 81.2),
    "m48": (0.3, 81.4),
}


def get_config(variant=None):
  drop_path, _ = recipes.variant(VARIANTS, variant)
  return classification.metaformer_baseline(
      f"randformer_{variant}", drop_path_rate=drop_path)

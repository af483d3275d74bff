r"""IdentityFormer (arXiv 2210.13452) on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/identityformer.py:s12 \
        --config.data.path=/path/to/imagenet

Settings: scripts/identityformer/ of github.com/sail-sg/metaformer.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import classification

# Drop path, published top-1.
VARIANTS = {
    "s12": (0.1, 74.6),
    "s24": (0.1, 78.2),
    "s36": (0.2, 79.3),
    "m36": (0.3, 80.0),
    "m48": (0.4, 80.4),
}


def get_config(variant=None):
  drop_path, _ = recipes.variant(VARIANTS, variant)
  return classification.metaformer_baseline(
      f"identityformer_{variant}", drop_path_rate=drop_path)

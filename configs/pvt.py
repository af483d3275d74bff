r"""PVT (arXiv 2102.12122) on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/pvt.py:tiny \
        --config.data.path=/path/to/imagenet

Settings: classification/ of github.com/whai362/PVT.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import classification

SOURCE = "arXiv 2102.12122"

# Drop path, clip_norm, published top-1.
VARIANTS = {
    "tiny": (0.1, None, 75.1),
    "small": (0.1, None, 79.8),
    "medium": (0.3, 1.0, 81.2),
    "large": (0.3, 1.0, 81.7),
}


def get_config(variant=None):
  drop_path, clip_norm, _ = recipes.variant(VARIANTS, variant)
  return classification.pvt(f"pvt_{variant}", drop_path_rate=drop_path,
                            clip_norm=clip_norm)

r"""DeiT (arXiv 2012.12877) on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/deit.py:small_patch16_224 \
        --config.data.path=/path/to/imagenet

Settings: table 9 of the paper, and main.py of github.com/facebookresearch/deit.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import classification

SOURCE = "arXiv 2012.12877"

# Published top-1.
VARIANTS = {
    "small_patch16_224": (79.8,),
    "base_patch16_224": (81.8,),
}


def get_config(variant=None):
  recipes.variant(VARIANTS, variant)
  return classification.deit(f"deit_{variant}")

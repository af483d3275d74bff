r"""ResMLP (arXiv 2105.03404) on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/resmlp.py:12_224 \
        --config.data.path=/path/to/imagenet

Settings: section 3 of the paper.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import classification

SOURCE = "arXiv 2105.03404"

# Published top-1.
VARIANTS = {
    "12_224": (76.6,),
    "24_224": (79.4,),
    "big_24_patch16_224": (81.0,),
}

NOTES = {"*": "only LAMB, its rate, the weight decay and the epochs are "
              "published; the rest, including the batch size, is assumed to "
              "be DeiT's"}


def get_config(variant=None):
  recipes.variant(VARIANTS, variant)
  return classification.resmlp(f"resmlp_{variant}")

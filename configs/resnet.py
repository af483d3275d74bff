r"""ResNet on ImageNet-1K, by the recipe A2 of arXiv 2110.00476.

    python -m metaformer_jax.main --config=configs/resnet.py:50 \
        --config.data.path=/path/to/imagenet

Settings: table 2 of that paper, "ResNet strikes back".
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import classification

SOURCE = "arXiv 2111.11418, table 2"

# Published top-1.
VARIANTS = {
    "18": (70.6,),
    "34": (75.5,),
    "50": (79.8,),
    "101": (81.3,),
    "152": (81.8,),
}

NOTES = {"*": "task.bce_threshold is not published; 0.2 is what other "
              "published commands for A2 use"}


def get_config(variant=None):
  recipes.variant(VARIANTS, variant)
  return classification.rsb_a2(f"resnet{variant}")

r"""UPerNet on ADE20K with the models of arXiv 2210.13452.

    python -m metaformer_jax.main \
        --config=configs/ade20k_upernet.py:caformer_s18 \
        --config.data.path=/path/to/ADEChallengeData2016

The settings are not published; those of Swin are used, as a starting point
(`recipes.segmentation.upernet`).
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import segmentation

# As arXiv 2210.13452 does not have it in its first versions, mIoU is quoted
# from a later paper.
SOURCE = "single scale; quoted in docs/segmentation.md"

# Drop path, published mIoU.
VARIANTS = {
    "convformer_s18": (0.2, 47.5),
    "convformer_s36": (0.3, 49.6),
    "convformer_m36": (0.4, 50.4),
    "convformer_b36": (0.6, None),
    "caformer_s18": (0.2, 48.1),
    "caformer_s36": (0.3, 50.6),
    "caformer_m36": (0.4, 51.7),
    "caformer_b36": (0.6, None),
    "poolformerv2_s12": (0.1, None),
    "poolformerv2_s24": (0.1, None),
    "poolformerv2_s36": (0.2, None),
    "poolformerv2_m36": (0.3, None),
    "poolformerv2_m48": (0.4, None),
}

NOTES = {"*": "settings are not published; those of Swin"}


def get_config(variant=None):
  drop_path_rate, _ = recipes.variant(VARIANTS, variant)
  return segmentation.upernet(variant, drop_path_rate=drop_path_rate)

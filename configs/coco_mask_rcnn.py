r"""Mask R-CNN on COCO (arXiv 2111.11418, table 3), the 1x schedule.

    python -m metaformer_jax.main \
        --config=configs/coco_mask_rcnn.py:poolformer_s12 \
        --config.data.path=/path/to/coco

Settings: detection/configs of github.com/sail-sg/poolformer, for mmdetection
2.19. The published weights of ImageNet-1K are downloaded. docs/detection.md
compares the results.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import detection

SOURCE = "1x; sources in docs/detection.md"

# Published box and mask AP.
VARIANTS = {
    "poolformer_s12": ((37.3, 34.6),),
    "poolformer_s24": ((40.1, 37.0),),
    "poolformer_s36": ((41.0, 37.7),),
    "resnet18": ((34.0, 31.2),),
    "resnet50": ((38.0, 34.4),),
    "resnet101": ((40.4, 36.4),),
    "pvt_tiny": ((36.7, 35.1),),
    "pvt_small": ((40.4, 37.8),),
    "pvt_medium": ((42.0, 39.0),),
    "pvt_large": ((42.9, 39.5),),
    "convformer_s18": (None,),
    "caformer_s18": (None,),
}

NOTES = {
    "resnet*": "settings of mmdetection; its initial weights are torchvision's",
    "pvt_*": "AP and settings of detection/ of github.com/whai362/PVT",
    "c*former_s18": "settings are not published; those of Swin",
}


def get_config(variant=None):
  recipes.variant(VARIANTS, variant)
  return detection.mask_rcnn(variant)

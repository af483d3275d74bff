r"""Faster R-CNN on COCO, with the settings of Mask R-CNN.

    python -m metaformer_jax.main \
        --config=configs/coco_faster_rcnn.py:poolformer_s12 \
        --config.data.path=/path/to/coco

The published weights of ImageNet-1K are downloaded. docs/detection.md compares
the results.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import detection

SOURCE = "configs/faster_rcnn of github.com/open-mmlab/mmdetection, 1x"

# Published box AP.
VARIANTS = {
    "poolformer_s12": (None,),
    "poolformer_s24": (None,),
    "poolformer_s36": (None,),
    "resnet18": (None,),
    "resnet50": (37.4,),
    "resnet101": (39.4,),
    "pvt_tiny": (None,),
    "pvt_small": (None,),
    "pvt_medium": (None,),
    "pvt_large": (None,),
    "convformer_s18": (None,),
    "caformer_s18": (None,),
}

NOTES = {
    "resnet*": "settings of mmdetection; its initial weights are torchvision's",
    "poolformer_*": "nothing is published; settings of its Mask R-CNN",
    "pvt_*": "nothing is published; settings of its Mask R-CNN",
    "c*former_s18": "settings are not published; those of Swin",
}


def get_config(variant=None):
  recipes.variant(VARIANTS, variant)
  return detection.faster_rcnn(variant)

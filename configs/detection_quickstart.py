r"""A small PoolFormer finds objects on composed scenes; minutes on a CPU.

    python -m metaformer_jax.main --config=configs/detection_quickstart.py \
        --workdir=runs/objects

By RetinaNet, or with configs/detection_quickstart.py:mask_rcnn by Mask R-CNN.
The scenes are digits on photographs, both from scikit-learn: nothing is
downloaded. Test scenes have digits by other writers, on other halves of the
photographs. What was measured is in docs/results.md.
"""

from metaformer_jax import recipes
from metaformer_jax.config import typed

# Detectors, and the scale of their anchors, as digits are small.
HEADS = {"retinanet": 3.0, "mask_rcnn": 8.0}


def get_config(variant="retinanet"):
  anchor_scale = recipes.variant(HEADS, variant)
  config = typed.default("detection")
  config.model.name = "poolformer_s12"
  config.model.depths = (1, 1, 2, 1)
  config.model.dims = (32, 64, 96, 128)
  config.model.norm = "layer_norm"
  config.model.layer_scale_init = 1.0
  config.task.head = variant
  config.task.scale = (128, 96)
  config.task.fpn_dim = 64
  config.task.head_dim = 64
  config.task.head_depth = 2
  config.task.anchor_scale = anchor_scale
  config.task.anchor_ratios = (1.0, 1.7, 3.0)  # Digits are higher than wide.
  config.task.flip = 0.0  # They have a left and a right.
  config.task.max_boxes = 8
  config.task.candidates = 100
  config.data.source = "scenes"
  config.data.mean = (0.5, 0.5, 0.5)
  config.data.std = (0.25, 0.25, 0.25)
  config.optim.base_lr = 0.064  # 0.001 for a batch of 16.
  config.optim.clip_norm = 5.0
  config.optim.schedule = "cosine"
  config.optim.min_lr = 0.0
  config.optim.warmup_epochs = 1.0
  config.train.batch_size = 16
  config.train.epochs = 6.0
  config.eval.batch_size = 40
  config.eval.every_epochs = 2.0
  config.checkpoint.every_steps = 500
  config.log.every_steps = 50
  if variant == "mask_rcnn":
    config.task.box_dim = 256
    config.task.object_mask_size = 64  # That of the largest digit.
    config.task.anchor_samples = 128
    config.task.roi_samples = 64
    config.task.train_candidates = config.task.proposals = 200
  return config

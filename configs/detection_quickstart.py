r"""A small PoolFormer with RetinaNet on composed scenes; minutes on a CPU.

    python -m metaformer_jax.main --config=configs/detection_quickstart.py \
        --workdir=runs/objects

The scenes are digits on photographs, both from scikit-learn: nothing is
downloaded. Test scenes have digits by other writers, on other halves of the
photographs. What was measured is in docs/results.md.
"""

from metaformer_jax.config import typed


def get_config():
  config = typed.default("detection")
  config.model.name = "poolformer_s12"
  config.model.depths = (1, 1, 2, 1)
  config.model.dims = (32, 64, 96, 128)
  config.model.norm = "layer_norm"
  config.model.layer_scale_init = 1.0
  config.task.scale = (128, 96)
  config.task.fpn_dim = 64
  config.task.head_dim = 64
  config.task.head_depth = 2
  config.task.anchor_scale = 3.0  # Digits are small, and higher than wide.
  config.task.anchor_ratios = (1.0, 1.7, 3.0)
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
  return config

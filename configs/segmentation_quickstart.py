r"""A small PoolFormer with Semantic FPN on composed scenes; minutes on a CPU.

    python -m metaformer_jax.main --config=configs/segmentation_quickstart.py \
        --workdir=runs/scenes

The scenes are digits on photographs, both from scikit-learn: nothing is
downloaded. Test scenes have digits by other writers, on other halves of the
photographs. What was measured is in docs/results.md.
"""

from metaformer_jax.config import typed


def get_config():
  config = typed.default("segmentation")
  config.model.name = "poolformer_s12"
  config.model.depths = (2, 2, 2, 2)
  config.model.dims = (32, 64, 96, 128)
  config.model.norm = "layer_norm"
  config.model.layer_scale_init = 1.0
  config.task.fpn_dim = 64
  config.task.head_dim = 64
  config.task.head_drop_rate = 0.0
  config.task.scale = (64, 56)
  config.task.scale_range = (0.8, 1.25)
  config.task.crop_size = (48, 48)
  config.task.cat_max_ratio = 0.9
  config.task.flip = 0.0  # Digits have a left and a right.
  config.task.photometric = False
  config.task.eval_align = 1  # Small images would be stretched a lot.
  config.task.eval_canvases = 3
  config.data.source = "scenes"
  config.data.mean = (0.5, 0.5, 0.5)
  config.data.std = (0.25, 0.25, 0.25)
  config.optim.base_lr = 0.192  # 0.003 for a batch of 16.
  config.optim.schedule = "poly"
  config.optim.min_lr = 0.0
  config.optim.warmup_epochs = 1.0
  config.train.batch_size = 16
  config.train.epochs = 15.0
  config.eval.batch_size = 40
  config.eval.every_epochs = 3.0
  config.checkpoint.every_steps = 500
  config.log.every_steps = 50
  return config

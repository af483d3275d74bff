"""A small PoolFormer on scikit-learn's handwritten digits.

    python -m metaformer_jax.main --config=configs/quickstart.py

Hardware: two CPU cores, a minute or two; nothing is downloaded.
Expected: above 95% top-1 on the 297 test digits (docs/results.md).
"""

from metaformer_jax.config import default


def get_config():
  config = default()
  config.model.name = "poolformer_s12"
  config.task.num_classes = 10
  config.model.depths = (1, 1, 2, 1)
  config.model.dims = (32, 64, 128, 256)
  # Large, as branches that start near zero learn too slowly for a short run.
  config.model.layer_scale_init = 0.1
  config.model.drop_path_rate = 0.1
  config.data.source = "digits"
  # Four times the original size, so that the stem's stride of 4 keeps every
  # pixel.
  config.task.image_size = 32
  config.task.crop_pct = 1.0
  config.task.crop_area = (0.5, 1.0)
  config.task.flip = 0.0
  config.optim.base_lr = 8e-3
  config.train.batch_size = 128
  config.train.epochs = 50.0
  config.train.ema_decay = 0.98
  config.eval.batch_size = 256
  config.eval.every_epochs = 10.0
  return config

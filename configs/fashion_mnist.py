"""A small PoolFormer on Fashion-MNIST, 60,000 + 10,000 images of 28x28.

    apt-get install dataset-fashion-mnist   # Debian; or set config.data.path
    python -m metaformer_jax.main --config=configs/fashion_mnist.py

Any folder with MNIST's four idx files works: `--config.data.path=FOLDER`.
Hardware: two CPU cores, under 20 minutes.
Expected: above 90% top-1 (docs/results.md).
"""

from metaformer_jax.config import default


def get_config():
  config = default()
  config.model.name = "poolformer_s12"
  config.task.num_classes = 10
  config.model.depths = (1, 1, 2, 1)
  config.model.dims = (32, 64, 128, 256)
  # With so few tokens, statistics of each token train faster than statistics of
  # the whole image.
  config.model.norm = "layer_norm"
  config.model.layer_scale_init = 1.0
  config.data.source = "idx"
  # The folder of Debian's package.
  config.data.path = "/usr/share/datasets/fashion-mnist"
  config.task.image_size = 28
  config.task.crop_pct = 1.0
  config.task.crop_area = (0.9, 1.0)
  config.task.crop_ratio = (0.95, 1.05)
  config.task.train_interpolation = "bilinear"
  config.data.mean = (0.286, 0.286, 0.286)
  config.data.std = (0.353, 0.353, 0.353)
  config.optim.base_lr = 0.016
  config.optim.warmup_epochs = 0.5
  config.train.batch_size = 64
  config.train.epochs = 12.0
  config.task.label_smoothing = 0.05
  config.train.ema_decay = 0.995
  config.eval.every_epochs = 2.0
  return config

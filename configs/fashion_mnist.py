"""A small PoolFormer on Fashion-MNIST, 60,000 + 10,000 images of 28x28.

    apt-get install dataset-fashion-mnist   # Debian; or set config.data.path
    python -m metaformer_jax.main --config=configs/fashion_mnist.py

Any folder with MNIST's four idx files does: `--config.data.path=FOLDER`.
Hardware: two CPU cores, under 20 minutes.
Expected: above 90% top-1 (docs/results.md).
"""

from metaformer_jax.config import resolve as config_lib


def get_config():
  config = config_lib.default()
  config.model.name = "poolformer_s12"
  config.model.num_classes = 10
  config.model.depths = (1, 1, 2, 1)
  config.model.dims = (32, 64, 128, 256)
  # On images of so few tokens, statistics of each token learn faster than
  # those of the whole image.
  config.model.norm = "layer_norm"
  config.model.layer_scale_init = 1.0
  config.data.source = "idx"
  # Where Debian's package puts the four files.
  config.data.path = "/usr/share/datasets/fashion-mnist"
  config.data.image_size = 28
  config.data.crop_pct = 1.0
  config.data.crop_area = (0.9, 1.0)
  config.data.crop_ratio = (0.95, 1.05)
  config.data.train_interpolation = "bilinear"
  config.data.mean = (0.286, 0.286, 0.286)
  config.data.std = (0.353, 0.353, 0.353)
  config.optim.base_lr = 0.016
  config.optim.warmup_epochs = 0.5
  config.train.batch_size = 64
  config.train.epochs = 12.0
  config.train.label_smoothing = 0.05
  config.train.ema_decay = 0.995
  config.eval.every_epochs = 2.0
  return config

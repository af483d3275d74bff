"""scikit-learn's handwritten digits: a small PoolFormer in a minute."""

from metaformer_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.model.num_classes = 10
  config.model.depths = (1, 1, 2, 1)
  config.model.dims = (32, 64, 128, 256)
  config.model.in_patch_size = 3
  config.model.in_stride = 2
  config.model.in_pad = 1
  config.data.source = "digits"
  config.data.image_size = 32
  config.data.crop_pct = 1.0
  config.data.crop_area = (0.6, 1.0)
  config.data.flip = 0.0
  config.optim.base_lr = 8e-3
  config.train.batch_size = 128
  config.train.epochs = 30.0
  config.eval.every_epochs = 5.0
  return config

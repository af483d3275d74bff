"""scikit-learn's handwritten digits: a small PoolFormer in a minute."""

from metaformer_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.data.source = "digits"
  config.model.num_classes = 10
  return config

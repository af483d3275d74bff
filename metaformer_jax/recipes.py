"""Published training recipes, each a function that returns a ConfigDict.

A config file calls one and sets what differs.
"""

import ml_collections

from metaformer_jax import config as config_lib
from metaformer_jax.models import registry


def poolformer_imagenet(name: str, drop_path_rate: float,
                        ) -> ml_collections.ConfigDict:
  """PoolFormer on ImageNet-1K (arXiv 2111.11418, section 4.1 and table 6).

  AdamW, 300 epochs of batch 4096 at a peak learning rate of 4e-3, 5 epochs of
  warm-up, cosine to 1e-5, weight decay 0.05, label smoothing 0.1; crops, flips
  and the evaluation's crop as in the official repository. Its RandAugment,
  mixup, cutmix, random erasing and 10 cooldown epochs are not here yet, so
  neither is its accuracy to be expected.

  The data is a folder that holds train/ and val/; `config.data.source="tfds"`
  and `config.data.name="imagenet2012"` read it from TFDS.
  """
  spec = registry.get_spec(name)
  config = config_lib.default()
  config.model.name = name
  config.model.num_classes = 1000
  config.model.drop_path_rate = drop_path_rate
  config.model.dtype = "bfloat16"
  config.data.source = "folder"
  config.data.path = "~/data/imagenet"
  config.data.image_size = spec.input_size
  config.data.crop_pct = spec.crop_pct
  config.data.interpolation = spec.interpolation
  config.data.mean = spec.mean
  config.data.std = spec.std
  config.data.workers = -1
  config.optim.base_lr = 1e-3
  config.optim.min_lr = 1e-5
  config.optim.warmup_lr = 1e-6
  config.optim.warmup_epochs = 5.0
  config.optim.weight_decay = 0.05
  config.train.batch_size = 4096
  config.train.epochs = 300.0
  config.train.label_smoothing = 0.1
  config.eval.batch_size = 4096
  config.checkpoint.every_steps = 1000
  return config

"""Published training recipes, each a function that returns a ConfigDict.

A config file calls one and sets what differs. The data is a folder that holds
train/ and val/; `config.data.source="tfds"` and
`config.data.name="imagenet2012"` read it from TFDS.
"""

import ml_collections

from metaformer_jax.config import resolve as config_lib
from metaformer_jax.models import registry


def imagenet(name: str, *, drop_path_rate: float) -> ml_collections.ConfigDict:
  """What the recipes have in common: DeiT's, as most of the field's.

  AdamW, 300 epochs and 10 of cool-down, 5 of warm-up, a cosine set anew each
  epoch, weight decay 0.05; RandAugment, mixup, cutmix, random erasing, label
  smoothing (arXiv 2012.12877, table 9, and its code). The learning rate is
  1e-3 for a batch of 1024 and scales with it.
  """
  spec = registry.get_spec(name)
  config = config_lib.default()
  config.model.name = name
  config.model.num_classes = spec.num_classes
  config.model.drop_path_rate = drop_path_rate
  config.model.dtype = "bfloat16"
  config.data.source = "folder"
  config.data.path = "~/data/imagenet"
  config.data.image_size = spec.input_size
  config.data.crop_pct = spec.crop_pct
  config.data.interpolation = spec.interpolation
  config.data.mean = spec.mean
  config.data.std = spec.std
  config.data.auto_augment = "rand-m9-mstd0.5-inc1"
  config.data.workers = -1
  config.optim.base_lr = 1e-3
  config.optim.min_lr = 1e-5
  config.optim.warmup_lr = 1e-6
  config.optim.warmup_epochs = 5.0
  config.optim.cooldown_epochs = 10.0
  config.optim.schedule_per = "epoch"
  config.optim.weight_decay = 0.05
  config.train.batch_size = 1024
  config.train.epochs = 300.0
  config.train.label_smoothing = 0.1
  config.train.mixup = 0.8
  config.train.cutmix = 1.0
  config.train.erasing = 0.25
  config.eval.batch_size = 4096
  config.checkpoint.every_steps = 1000
  return config


def poolformer(name: str, *, drop_path_rate: float = 0.1,
               ) -> ml_collections.ConfigDict:
  """PoolFormer and its ablation (arXiv 2111.11418, section 4.1 and table 6).

  The official train.py, with the paper's batch of 4096. The hybrids with
  attention have a batch of 1024 (appendix A).
  """
  config = imagenet(name, drop_path_rate=drop_path_rate)
  config.train.batch_size = 4096
  if "attention" in registry.get_spec(name).hparams["token_mixers"]:
    config.train.batch_size = 1024
  return config


def metaformer_baseline(name: str, *, drop_path_rate: float,
                        head_drop_rate: float = 0.0,
                        ) -> ml_collections.ConfigDict:
  """The models of arXiv 2210.13452 on ImageNet-1K (scripts/*/train_*.sh).

  A batch of 4096. ConvFormer and CAFormer warm up for 20 epochs; CAFormer is
  trained by LAMB at twice the learning rate.
  """
  config = imagenet(name, drop_path_rate=drop_path_rate)
  config.train.batch_size = 4096
  if name.startswith(("convformer", "caformer")):
    config.model.head_drop_rate = head_drop_rate
    config.optim.warmup_epochs = 20.0
  if name.startswith("caformer"):
    config.optim.name = "lamb"
    config.optim.base_lr = 2e-3
  return config


def metaformer_finetune(name: str, *, init: str, drop_path_rate: float,
                        head_drop_rate: float) -> ml_collections.ConfigDict:
  """30 epochs from trained weights (scripts/*/finetune_*_384.sh).

  A constant learning rate, no mixup and no cutmix; the moving average of the
  weights is what is evaluated. `init` is the weights' file in ~/weights.
  """
  config = metaformer_baseline(name, drop_path_rate=drop_path_rate,
                               head_drop_rate=head_drop_rate)
  config.init = f"~/weights/{init}"
  config.optim.schedule = "constant"
  config.optim.base_lr = 1e-4 if name.startswith("caformer") else 5e-5
  config.optim.warmup_epochs = 0.0
  config.optim.cooldown_epochs = 0.0
  config.train.batch_size = 1024
  config.train.epochs = 30.0
  config.train.mixup = 0.0
  config.train.cutmix = 0.0
  config.train.ema_decay = 0.9999
  config.eval.batch_size = 1024
  return config


def metaformer_in21k(name: str) -> ml_collections.ConfigDict:
  """ImageNet-21K, 21,841 classes (arXiv 2210.13452).

  The repository has no script for it, and the paper's table of its
  hyper-parameters was not at hand: those of the 1K recipe stand here, with a
  drop path of 0.1 and 90 epochs, as a place to start from, not as what gave
  the published weights.
  """
  config = metaformer_baseline(name, drop_path_rate=0.1)
  config.data.path = "~/data/imagenet21k"
  config.train.epochs = 90.0
  config.optim.cooldown_epochs = 0.0
  config.optim.warmup_epochs = 5.0
  return config


def deit(name: str) -> ml_collections.ConfigDict:
  """DeiT on ImageNet-1K (arXiv 2012.12877; main.py of the official code).

  Each image comes three times, differently augmented; bicubic crops.
  """
  config = imagenet(name, drop_path_rate=0.1)
  config.data.repeats = 3
  config.data.train_interpolation = "bicubic"
  return config


def pvt(name: str, *, drop_path_rate: float = 0.1,
        clip_norm: float | None = None) -> ml_collections.ConfigDict:
  """PVT on ImageNet-1K (arXiv 2102.12122; classification/ of its code): DeiT's,
  with the drop path and the clipping of its configs/pvt."""
  config = deit(name)
  config.model.drop_path_rate = drop_path_rate
  config.optim.clip_norm = clip_norm
  return config


def resmlp(name: str) -> ml_collections.ConfigDict:
  """ResMLP on ImageNet-1K (arXiv 2105.03404, section 3).

  LAMB at 5e-3, weight decay 0.2, 400 epochs; the rest, of which the batch of
  1024, is taken to be DeiT's, as no command is published.
  """
  config = deit(name)
  config.optim.name = "lamb"
  config.optim.base_lr = 5e-3
  config.optim.weight_decay = 0.2
  config.train.epochs = 400.0
  return config


def rsb_a2(name: str) -> ml_collections.ConfigDict:
  """ResNet by the recipe A2 of arXiv 2110.00476, table 2.

  LAMB at 5e-3 for a batch of 2048, RandAugment of magnitude 7, mixup 0.1, no
  erasing, no label smoothing. Binary cross-entropy, in which a mixed image has
  every label that it shows a fifth of: timm's bce_target_thresh, which the
  paper does not give; 0.2 is what published commands for A2 pass to timm, e.g.
  that of github.com/Alibaba-MIIL/ML_Decoder.
  """
  config = deit(name)
  config.model.drop_path_rate = 0.05
  config.data.auto_augment = "rand-m7-mstd0.5-inc1"
  config.data.train_interpolation = "random"
  config.optim.name = "lamb"
  config.optim.base_lr = 2.5e-3
  config.optim.weight_decay = 0.02
  config.optim.cooldown_epochs = 0.0
  config.train.batch_size = 2048
  config.train.loss = "bce"
  config.train.bce_threshold = 0.2
  config.train.label_smoothing = 0.0
  config.train.mixup = 0.1
  config.train.erasing = 0.0
  return config

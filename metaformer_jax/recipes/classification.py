"""Recipes of image classification: functions that return a ConfigDict.

A config file calls one and sets what differs. The data is a folder that holds
train/ and val/; with `config.data.source="tfds"` and
`config.data.name="imagenet2012"` it is read from TFDS.
"""

from metaformer_jax.config import trees, typed
from metaformer_jax.models import registry


def imagenet(name: str, *, drop_path_rate: float) -> trees.ConfigDict:
  """What the recipes have in common: DeiT's (arXiv 2012.12877, table 9).

  AdamW; 300 epochs, 5 of them warm-up, and 10 of cool-down; a cosine schedule
  that is updated each epoch; weight decay 0.05; RandAugment, mixup, cutmix,
  random erasing and label smoothing. The learning rate is 1e-3 for a batch of
  1024 and scales with it.
  """
  config = typed.default()
  config.model.name = name
  config.task.num_classes = registry.get_spec(name).num_classes
  config.model.drop_path_rate = drop_path_rate
  config.model.dtype = "bfloat16"
  config.data.source = "folder"
  config.data.path = "~/data/imagenet"
  config.task.auto_augment = "rand-m9-mstd0.5-inc1"
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
  config.task.label_smoothing = 0.1
  config.task.mixup = 0.8
  config.task.cutmix = 1.0
  config.task.erasing = 0.25
  config.eval.batch_size = 4096
  config.checkpoint.every_steps = 1000
  return config


def poolformer(name: str, *, drop_path_rate: float = 0.1,
               batch_size: int = 4096) -> trees.ConfigDict:
  """PoolFormer and its ablation (arXiv 2111.11418, section 4.1 and table 6).

  Settings of the official train.py, with the paper's batch size. The paper
  trains the hybrids with attention with a batch of 1024 (appendix A).
  """
  config = imagenet(name, drop_path_rate=drop_path_rate)
  config.train.batch_size = batch_size
  return config


def metaformer_baseline(
    name: str, *, drop_path_rate: float, head_drop_rate: float | None = None,
    optimizer: str = "adamw", base_lr: float = 1e-3,
    warmup_epochs: float = 5.0) -> trees.ConfigDict:
  """The models of arXiv 2210.13452 on ImageNet-1K (scripts/*/train_*.sh).

  A batch of 4096. The scripts of ConvFormer and CAFormer set warmup_epochs to
  20; those of CAFormer also the optimizer to LAMB and base_lr to 2e-3.
  """
  config = imagenet(name, drop_path_rate=drop_path_rate)
  config.model.head_drop_rate = head_drop_rate
  config.optim.name = optimizer
  config.optim.base_lr = base_lr
  config.optim.warmup_epochs = warmup_epochs
  config.train.batch_size = 4096
  return config


def metaformer_finetune(
    name: str, *, init: str, drop_path_rate: float, head_drop_rate: float,
    base_lr: float, optimizer: str = "adamw") -> trees.ConfigDict:
  """30 epochs from trained weights (scripts/*/finetune_*_384.sh).

  A constant learning rate, no mixup and no cutmix; the moving average of the
  weights is evaluated. `init` is `config.init`.
  """
  config = metaformer_baseline(
      name, drop_path_rate=drop_path_rate, head_drop_rate=head_drop_rate,
      optimizer=optimizer, base_lr=base_lr, warmup_epochs=0.0)
  config.init = init
  config.optim.schedule = "constant"
  config.optim.cooldown_epochs = 0.0
  config.train.batch_size = 1024
  config.train.epochs = 30.0
  config.task.mixup = 0.0
  config.task.cutmix = 0.0
  config.train.ema_decay = 0.9999
  config.eval.batch_size = 1024
  return config


def metaformer_in21k(
    name: str, *, drop_path_rate: float, head_drop_rate: float,
    optimizer: str = "adamw", base_lr: float = 1e-3,
    ) -> trees.ConfigDict:
  """A starting point for ImageNet-21K, 21,841 classes (arXiv 2210.13452).

  Not the recipe of the published weights: the repository has no script for it,
  and the paper's table of its hyper-parameters was not available. These are
  the ones of `metaformer_baseline`, with 90 epochs, 5 of them warm-up.
  """
  config = metaformer_baseline(
      name, drop_path_rate=drop_path_rate, head_drop_rate=head_drop_rate,
      optimizer=optimizer, base_lr=base_lr)
  config.data.path = "~/data/imagenet21k"
  config.train.epochs = 90.0
  config.optim.cooldown_epochs = 0.0
  return config


def deit(name: str) -> trees.ConfigDict:
  """DeiT on ImageNet-1K (arXiv 2012.12877; main.py of the official code).

  Repeated augmentation, three times per image; bicubic crops.
  """
  config = imagenet(name, drop_path_rate=0.1)
  config.task.repeats = 3
  config.task.train_interpolation = "bicubic"
  return config


def pvt(name: str, *, drop_path_rate: float = 0.1,
        clip_norm: float | None = None) -> trees.ConfigDict:
  """PVT on ImageNet-1K (arXiv 2102.12122; classification/ of its code).

  DeiT's recipe, with the drop path and the clipping of the code's configs/pvt.
  """
  config = deit(name)
  config.model.drop_path_rate = drop_path_rate
  config.optim.clip_norm = clip_norm
  return config


def resmlp(name: str) -> trees.ConfigDict:
  """ResMLP on ImageNet-1K (arXiv 2105.03404, section 3).

  LAMB at 5e-3, weight decay 0.2 and 400 epochs are published. The rest, with
  the batch of 1024, is assumed to be DeiT's: no command is published.
  """
  config = deit(name)
  config.optim.name = "lamb"
  config.optim.base_lr = 5e-3
  config.optim.weight_decay = 0.2
  config.train.epochs = 400.0
  return config


def rsb_a2(name: str) -> trees.ConfigDict:
  """ResNets by the recipe A2 of arXiv 2110.00476, table 2.

  LAMB at 5e-3 for a batch of 2048, RandAugment of magnitude 7, mixup 0.1, no
  erasing, no label smoothing. Binary cross-entropy, with targets above
  `bce_threshold` set to 1. The paper does not give the threshold; 0.2 is what
  published commands for A2 pass to timm as bce_target_thresh, e.g. the one of
  github.com/Alibaba-MIIL/ML_Decoder.
  """
  config = deit(name)
  config.model.drop_path_rate = 0.05
  config.task.auto_augment = "rand-m7-mstd0.5-inc1"
  config.task.train_interpolation = "random"
  config.optim.name = "lamb"
  config.optim.base_lr = 2.5e-3
  config.optim.weight_decay = 0.02
  config.optim.cooldown_epochs = 0.0
  config.train.batch_size = 2048
  config.task.loss = "bce"
  config.task.bce_threshold = 0.2
  config.task.label_smoothing = 0.0
  config.task.mixup = 0.1
  config.task.erasing = 0.0
  return config

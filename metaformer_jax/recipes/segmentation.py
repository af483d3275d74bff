"""Recipes of semantic segmentation: functions that return a ConfigDict."""

from metaformer_jax.config import ade20k as data
from metaformer_jax.config import trees, typed
from metaformer_jax.models import registry

# Images of the training split of ADE20K.
_ADE20K = 20_210

# What a run learns from the data.
CLASSES = {"class_names": data.CLASSES}


def ade20k(name: str, *, init: str | None, batch_size: int, steps: int,
           base_lr: float, weight_decay: float, drop_path_rate: float,
           eval_steps: int) -> trees.ConfigDict:
  """What the recipes on ADE20K have in common.

  Args:
    name: of the backbone.
    init: its weights.
    batch_size: images of 512 x 512 pixels per step.
    steps: of the run.
    base_lr: the peak rate for this batch size.
    weight_decay: of the optimizer.
    drop_path_rate: of the backbone.
    eval_steps: steps from one evaluation to the next.
  """
  config = typed.default("segmentation")
  config.model.name = name
  config.model.drop_path_rate = drop_path_rate
  config.model.dtype = "bfloat16"
  config.init = init
  config.task.num_classes = 150
  config.data.source = "ade20k"
  config.data.path = "~/data/ADEChallengeData2016"
  config.data.workers = -1
  config.optim.base_lr = base_lr * 1024 / batch_size
  config.optim.weight_decay = weight_decay
  config.optim.schedule = "poly"
  config.optim.min_lr = 0.0
  config.optim.warmup_epochs = 0.0
  config.train.batch_size = batch_size
  config.train.steps = steps
  config.eval.batch_size = 16
  config.eval.every_epochs = eval_steps * batch_size / _ADE20K
  config.checkpoint.every_steps = 1000
  return config


def semantic_fpn_poolformer(name: str, init: str | None = None,
                            ) -> trees.ConfigDict:
  """Semantic FPN with PoolFormer (arXiv 2111.11418, section 4.3).

  Settings of segmentation/configs/sem_fpn/PoolFormer of the official
  repository, and of the same folder of PVT's: AdamW at 2e-4 for a batch of 32,
  40,000 steps of a polynomial schedule without warm-up; weight decay of 1e-4,
  also of norms, biases and LayerScale.
  """
  config = ade20k(name, init=init or name, batch_size=32, steps=40_000,
                  base_lr=2e-4, weight_decay=1e-4, drop_path_rate=0.0,
                  eval_steps=4000)
  config.optim.decay_all = True
  return config


def semantic_fpn_pvt(name: str, init: str | None = None,
                     ) -> trees.ConfigDict:
  """Semantic FPN with PVT, without its class token (github.com/whai362/PVT)."""
  config = semantic_fpn_poolformer(name, init)
  config.model.class_token = False
  config.model.drop_path_rate = 0.1
  return config


def semantic_fpn_resnet(name: str, init: str | None = None,
                        ) -> trees.ConfigDict:
  """Semantic FPN with ResNet-V1c (sem_fpn/fpn_r50_512x512_40k_ade20k.py).

  SGD at 0.02 for a batch of 32, with a momentum of 0.9 and coupled weight
  decay. V1c has three 3 x 3 convolutions as its stem.
  """
  config = ade20k(name, init=init, batch_size=32, steps=40_000, base_lr=0.02,
                  weight_decay=5e-4, drop_path_rate=0.0, eval_steps=4000)
  config.model.stem = "3x3"
  config.optim.name = "sgd"
  config.optim.nesterov = False
  config.optim.decay_all = True
  return config


def upernet(name: str, *, drop_path_rate: float = 0.0,
            ) -> trees.ConfigDict:
  """UPerNet with the models of arXiv 2210.13452; a starting point.

  The repository has no code or settings for segmentation. The head is
  mmsegmentation's, and the schedule that of Swin (arXiv 2103.14030; its
  upernet_swin_*_512x512_160k_ade20k.py): AdamW at 6e-5 for a batch of 16, 1,500
  steps of warm-up, 160,000 steps with linear decay, weight decay 0.01. Vectors
  do not decay.
  """
  config = ade20k(name, init=name, batch_size=16, steps=160_000, base_lr=6e-5,
                  weight_decay=0.01, drop_path_rate=drop_path_rate,
                  eval_steps=16_000)
  config.task.head = "upernet"
  config.task.auxiliary_weight = 0.4
  config.optim.poly_power = 1.0
  config.optim.warmup_lr = 6e-11
  config.optim.warmup_epochs = 1500 * 16 / _ADE20K
  return config


def semantic_fpn(name: str, init: str | None = None,
                 ) -> trees.ConfigDict:
  """The recipe of the backbone's family; `init` as in the family's own."""
  recipe = {"pvt": semantic_fpn_pvt, "resnet": semantic_fpn_resnet}.get(
      registry.get_spec(name).family, semantic_fpn_poolformer)
  return recipe(name, init)


HEADS = {"semantic_fpn": semantic_fpn, "upernet": upernet}

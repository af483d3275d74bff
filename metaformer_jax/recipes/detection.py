"""Recipes of object detection: functions that return a ConfigDict."""

from collections.abc import Callable

from metaformer_jax.config import coco as data
from metaformer_jax.config import trees, typed
from metaformer_jax.models import registry

# Images of train2017 with objects, which a run trains on.
_COCO = 117_266

# In detection/pvt.py; of the others it is 0.
_PVT_DROP_PATH = {"pvt_tiny": 0.1, "pvt_small": 0.1}

# What differs in detection/configs/mask_rcnn_pvt_*_fpn_1x_coco.py.
_PVT_RCNN = {"pvt_large": {"base_lr": 2e-4 / 1.4, "batch_size": 8}}

# What a run learns from the data.
CLASSES = {"class_names": data.CLASSES, "category_ids": data.CATEGORY_IDS}


def coco(name: str, *, init: str | None, base_lr: float, weight_decay: float,
         drop_path_rate: float, warmup_steps: int = 500, batch_size: int = 16,
         ) -> trees.ConfigDict:
  """What the recipes on COCO have in common: mmdetection's 1x schedule.

  12 epochs on 8 GPUs, with 2 images each by default; the rate falls to a tenth
  after epochs 8 and 11. A linear warm-up begins at a thousandth of the rate.
  mmdetection fills epochs up to 7,330 steps, and so takes 10 steps more in all.

  Args:
    name: of the backbone.
    init: its weights.
    base_lr: the peak rate for this batch size.
    weight_decay: of the optimizer.
    drop_path_rate: of the backbone.
    warmup_steps: of the warm-up.
    batch_size: images of a step on 8 GPUs.
  """
  config = typed.default("detection")
  config.model.name = name
  config.model.drop_path_rate = drop_path_rate
  config.model.dtype = "bfloat16"
  config.init = init
  config.task.num_classes = len(data.CLASSES)
  config.task.loss_group = batch_size // 8  # The images of a GPU.
  config.data.source = "coco"
  config.data.path = "~/data/coco"
  config.data.workers = -1
  config.train.batch_size = batch_size
  config.train.epochs = 12.0
  config.optim.base_lr = base_lr * 1024 / batch_size
  config.optim.weight_decay = weight_decay
  config.optim.schedule = "step"
  config.optim.step_epochs = (8.0, 11.0)
  config.optim.warmup_lr = base_lr / 1000
  config.optim.warmup_epochs = warmup_steps * batch_size / _COCO
  config.eval.batch_size = 16
  config.checkpoint.every_steps = 1000
  return config


def poolformer(name: str, init: str | None = None, *, base_lr: float = 1e-4,
               batch_size: int = 16) -> trees.ConfigDict:
  """A detector with PoolFormer (arXiv 2111.11418, section 4.2).

  Settings of detection/configs of the official repository,
  retinanet_poolformer_*_fpn_1x_coco.py and mask_rcnn_*: AdamW at 1e-4 or 2e-4;
  weight decay of 1e-4, also of norms, biases and LayerScale; no drop path.
  """
  config = coco(name, init=init or name, base_lr=base_lr, weight_decay=1e-4,
                drop_path_rate=0.0, batch_size=batch_size)
  config.optim.decay_all = True
  return config


def pvt(name: str, init: str | None = None, *, base_lr: float = 1e-4,
        batch_size: int = 16) -> trees.ConfigDict:
  """A detector with PVT, without its class token (github.com/whai362/PVT).

  Settings of detection/configs/retinanet_pvt_*_fpn_1x_coco.py and mask_rcnn_*,
  which PoolFormer follows; the drop path is that of detection/pvt.py.
  """
  config = poolformer(name, init, base_lr=base_lr, batch_size=batch_size)
  config.model.class_token = False
  config.model.drop_path_rate = _PVT_DROP_PATH.get(name, 0.0)
  return config


def resnet(name: str, init: str | None = None, *,
           base_lr: float = 0.01) -> trees.ConfigDict:
  """A detector with ResNet (mmdetection's *_r50_fpn_1x_coco.py).

  SGD at 0.01 or 0.02 with a momentum of 0.9 and coupled weight decay of 1e-4;
  the stem and the first stage are frozen, and BatchNorm uses its running
  statistics. There the weights are torchvision's; `init` is for others than the
  model's own.
  """
  config = coco(name, init=init or name, base_lr=base_lr, weight_decay=1e-4,
                drop_path_rate=0.0)
  config.optim.name = "sgd"
  config.optim.nesterov = False
  config.optim.decay_all = True
  config.task.frozen_batch_norm = True
  config.train.freeze = ("backbone/stem", "backbone/stage1")
  return config


def metaformer_baseline(name: str, init: str | None = None,
                        ) -> trees.ConfigDict:
  """A detector with the models of arXiv 2210.13452; a starting point.

  Nothing is published: neither the paper nor its repository has detection.
  These are the settings of Swin for 1x (mmdetection's
  mask_rcnn_swin-t-p4-w7_fpn_1x_coco.py): AdamW at 1e-4, weight decay 0.05, drop
  path 0.2, 1,000 steps of warm-up. Vectors do not decay.
  """
  return coco(name, init=init or name, base_lr=1e-4, weight_decay=0.05,
              drop_path_rate=0.2, warmup_steps=1000)


def retinanet(name: str, init: str | None = None) -> trees.ConfigDict:
  """RetinaNet, by the recipe of the backbone's family; `init` as in that."""
  return _recipe(name)(name, init)


def faster_rcnn(name: str,
                init: str | None = None) -> trees.ConfigDict:
  """Faster R-CNN, by the settings of Mask R-CNN, as in mmdetection."""
  return _rcnn("faster_rcnn", name, init)


def mask_rcnn(name: str, init: str | None = None) -> trees.ConfigDict:
  """Mask R-CNN, by the recipe of the backbone's family; `init` as in that.

  The rates are twice those of RetinaNet, except for the models of arXiv
  2210.13452, and for PVT-Large, which has batches of 8 images.
  """
  return _rcnn("mask_rcnn", name, init)


def _rcnn(head: str, name: str, init: str | None) -> trees.ConfigDict:
  recipe = _recipe(name)
  settings = {poolformer: {"base_lr": 2e-4}, resnet: {"base_lr": 0.02},
              pvt: _PVT_RCNN.get(name, {"base_lr": 2e-4}),
              metaformer_baseline: {}}
  config = recipe(name, init, **settings[recipe])
  config.task.head = head
  return config


def _recipe(name: str) -> Callable[..., trees.ConfigDict]:
  """That of the backbone's family; PoolFormer's for families without one."""
  return {"pvt": pvt, "resnet": resnet,
          "metaformer_baselines": metaformer_baseline}.get(
              registry.get_spec(name).family, poolformer)


HEADS = {"retinanet": retinanet, "faster_rcnn": faster_rcnn,
         "mask_rcnn": mask_rcnn}

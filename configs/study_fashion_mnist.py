r"""The ablation of arXiv 2111.11418 on Fashion-MNIST, for two CPU cores.

    apt-get install dataset-fashion-mnist   # Debian; or set data.path
    python -m metaformer_jax.tools.study \
        --config=configs/study_fashion_mnist.py --workdir=runs/study

The variants are those of configs/ablations.py; the model and its training are
those of configs/fashion_mnist.py, shorter. Its baseline has LayerNorm: the
variant "layer_norm" would be the same and is replaced by "group_norm".
Hardware: two CPU cores, about two hours for the three seeds.
Expected: docs/results.md.
"""

import pathlib
import runpy

from metaformer_jax import recipes

_FOLDER = pathlib.Path(__file__).parent
_ABLATIONS = runpy.run_path(str(_FOLDER / "ablations.py"))["VARIANTS"]
_BASE = runpy.run_path(str(_FOLDER / "fashion_mnist.py"))["get_config"]

SEEDS = (0, 1, 2)

# The published accuracies and batch sizes are those of ImageNet.
VARIANTS = {
    name: ({key: value for key, value in settings.items()
            if key.startswith("model.")}, None)
    for name, (settings, _) in _ABLATIONS.items() if name != "layer_norm"
} | {"group_norm": ({"model.norm": "group_norm"}, None)}


def get_config(variant="baseline"):
  settings, _ = recipes.variant(VARIANTS, variant)
  config = _BASE()
  # The first stage has 7 x 7 patches: windows of 3 to 9 differ in two stages.
  config.model.depths = (1, 1, 2, 1)
  config.model.dims = (32, 64, 128, 256)
  config.optim.base_lr = 0.008
  config.optim.warmup_epochs = 0.1
  config.train.batch_size = 128
  config.train.epochs = 1.0
  config.train.ema_decay = 0.0
  config.eval.every_epochs = 10.0
  config.checkpoint.every_steps = 10_000
  config.log.tensorboard = False
  config.update_from_flattened_dict(settings)
  return config

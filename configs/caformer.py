r"""CAFormer (arXiv 2210.13452): ImageNet-1K, ImageNet-21K and fine-tuning.

    python -m metaformer_jax.main --config=configs/caformer.py:s18 \
        --config.data.path=/path/to/imagenet

Settings: scripts/caformer/ of github.com/sail-sg/metaformer. Variants with
initial weights download the published ones; `--config.init` names others. From
the head of ImageNet-21K, `*_in21ft1k` take the classes of ImageNet-1K.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import classification

# Recipe, drop path, dropout of the head, initial weights, published top-1.
VARIANTS = {
    "s18": ("imagenet", 0.15, 0.0, None, 83.6),
    "s18_384": ("finetune", 0.3, 0.4, "caformer_s18", 85.0),
    "s18_in21k": ("in21k", 0.1, 0.0, None, None),
    "s18_in21ft1k": ("finetune", 0.3, 0.4, "caformer_s18_in21k", 84.1),
    "s18_384_in21ft1k": ("finetune", 0.3, 0.4, "caformer_s18_in21k", 85.4),
    "s36": ("imagenet", 0.3, 0.4, None, 84.5),
    "s36_384": ("finetune", 0.5, 0.4, "caformer_s36", 85.7),
    "s36_in21k": ("in21k", 0.1, 0.0, None, None),
    "s36_in21ft1k": ("finetune", 0.5, 0.4, "caformer_s36_in21k", 85.8),
    "s36_384_in21ft1k": ("finetune", 0.5, 0.4, "caformer_s36_in21k", 86.9),
    "m36": ("imagenet", 0.4, 0.4, None, 85.2),
    "m36_384": ("finetune", 0.7, 0.4, "caformer_m36", 86.2),
    "m36_in21k": ("in21k", 0.1, 0.0, None, None),
    "m36_in21ft1k": ("finetune", 0.7, 0.4, "caformer_m36_in21k", 86.6),
    "m36_384_in21ft1k": ("finetune", 0.7, 0.4, "caformer_m36_in21k", 87.5),
    "b36": ("imagenet", 0.6, 0.5, None, 85.5),
    "b36_384": ("finetune", 0.8, 0.5, "caformer_b36", 86.4),
    "b36_in21k": ("in21k", 0.1, 0.0, None, None),
    "b36_in21ft1k": ("finetune", 0.8, 0.5, "caformer_b36_in21k", 87.4),
    "b36_384_in21ft1k": ("finetune", 0.8, 0.5, "caformer_b36_in21k", 88.1),
}

NOTES = {
    "b36": "the script names caformer_s36; its settings are assumed to be "
           "those of B36",
    "[sm]36_384": "the script names caformer_s18_384; its settings are assumed "
                  "to be those of this model",
    "*_in21k": "accuracy and hyper-parameters are not published; this is the "
               "recipe of ImageNet-1K with 90 epochs and drop path 0.1",
    "*_in21ft1k": "hyper-parameters are not published; this is the recipe of "
                  "the fine-tuning from ImageNet-1K at 384x384",
}


def get_config(variant=None):
  recipe, drop_path, head_drop, init, _ = recipes.variant(VARIANTS, variant)
  name = f"caformer_{variant}"
  rates = {"drop_path_rate": drop_path, "head_drop_rate": head_drop}
  if recipe == "finetune":
    return classification.metaformer_finetune(
        name, init=init, **rates, optimizer="lamb", base_lr=1e-4)
  if recipe == "in21k":
    return classification.metaformer_in21k(
        name, **rates, optimizer="lamb", base_lr=2e-3)
  return classification.metaformer_baseline(
      name, **rates, optimizer="lamb", base_lr=2e-3, warmup_epochs=20.0)

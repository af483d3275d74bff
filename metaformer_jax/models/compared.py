"""ViT, DeiT, MLP-Mixer and ResMLP: models that PoolFormer is compared with.

`source` says where MACs and top-1 are published. The evaluation settings are
timm's for the named weights. Two of those are not the weights of the published
top-1: ViT-B's come from another training on ImageNet-1K, Mixer-B's were
pretrained on ImageNet-21K.
"""

from metaformer_jax.models import settings
from metaformer_jax.models.spec import ModelSpec

_PAPER = "arXiv 2111.11418, table 2"
_DEIT = "github.com/facebookresearch/deit"
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _spec(family, class_name, name, weights, n_params, gmacs, top1, **fields):
  return ModelSpec(
      name=name, family=family,
      module=f"metaformer_jax.models.{family}:{class_name}",
      n_params=n_params, gmacs=gmacs, top1=top1,
      checkpoint=weights and f"timm/{name}.{weights}", **fields)


def _vit(name, *row, dim, n_heads, distilled=False, source=_PAPER, **fields):
  return _spec("vit", "VisionTransformer", name, *row, source=source,
               settings=settings.VisionTransformer(
                   dim=dim, depth=12, n_heads=n_heads, distilled=distilled),
               **fields)


def _resmlp(name, *row, depth, layer_scale_init, patch_size=16, dim=384,
            source=_PAPER, weights="fb_in1k"):
  return _spec("resmlp", "ResMLP", name, weights, *row, source=source,
               crop_pct=0.875, settings=settings.ResMLP(
                   patch_size=patch_size, dim=dim, depth=depth,
                   layer_scale_init=layer_scale_init))


_SMALL = {"dim": 384, "n_heads": 6}
_BASE = {"dim": 768, "n_heads": 12}
_DISTILLED = {"distilled": True, "source": f"{_DEIT}, README_deit.md"}

# name, weights, parameters, GMACs, top-1
MODELS = {spec.name: spec for spec in (
    _vit("vit_base_patch16_224", "augreg_in1k", 86_567_656, 17.6, 79.7,
         **_BASE, **_HALF),
    _vit("deit_small_patch16_224", "fb_in1k", 22_050_664, 4.6, 79.8, **_SMALL),
    _vit("deit_base_patch16_224", "fb_in1k", 86_567_656, 17.5, 81.8, **_BASE),
    _vit("deit_small_distilled_patch16_224", "fb_in1k", 22_436_432, None, 81.2,
         **_SMALL, **_DISTILLED),
    _vit("deit_base_distilled_patch16_224", "fb_in1k", 87_338_192, None, 83.4,
         **_BASE, **_DISTILLED),
    _spec("mlp_mixer", "MlpMixer", "mixer_b16_224", "goog_in21k_ft_in1k",
          59_880_472, 12.7, 76.4, source=_PAPER, crop_pct=0.875,
          settings=settings.MlpMixer(dim=768, depth=12), **_HALF),
    _resmlp("resmlp_12_224", 15_350_872, 3.0, 76.6, depth=12,
            layer_scale_init=0.1),
    _resmlp("resmlp_24_224", 30_020_680, 6.0, 79.4, depth=24,
            layer_scale_init=1e-5),
    # The paper's ResMLP-B24; its weights are not published.
    _resmlp("resmlp_big_24_patch16_224", 115_736_776, 23.0, 81.0, depth=24,
            layer_scale_init=1e-6, dim=768, weights=None),
    # The published ResMLP-B24 has patches of 8.
    _resmlp("resmlp_big_24_224", 129_138_280, 100.0, 81.0, depth=24,
            layer_scale_init=1e-6, patch_size=8, dim=768,
            source=f"{_DEIT}, README_resmlp.md (MACs); timm's "
            "results-imagenet.csv (top-1)"),
)}

"""The models of arXiv 2111.11418: PoolFormer, its ablation and its hybrids.

Sources: tables 1 and 5 of the paper (MACs, top-1), the official code
(github.com/sail-sg/poolformer, models/poolformer.py and models/metaformer.py:
hyper-parameters, evaluation crop); parameters counted from that code.
"""

from metaformer_jax.models import settings
from metaformer_jax.models.spec import ModelSpec

# Depths and dims of the sizes; the second paper's basic families share them.
SIZES = {
    "s12": {"depths": (2, 2, 6, 2), "dims": (64, 128, 320, 512)},
    "s24": {"depths": (4, 4, 12, 4), "dims": (64, 128, 320, 512)},
    "s36": {"depths": (6, 6, 18, 6), "dims": (64, 128, 320, 512)},
    "m36": {"depths": (6, 6, 18, 6), "dims": (96, 192, 384, 768)},
    "m48": {"depths": (8, 8, 24, 8), "dims": (96, 192, 384, 768)},
}

# LayerScale init, eval crop, parameters, GMACs, top-1
_POOLFORMERS = {
    "s12": (1e-5, 0.9, 11_915_176, 1.8, 77.2),
    "s24": (1e-5, 0.9, 21_388_968, 3.4, 80.3),
    "s36": (1e-6, 0.9, 30_862_760, 5.0, 81.4),
    "m36": (1e-6, 0.95, 56_172_520, 8.8, 82.1),
    "m48": (1e-6, 0.95, 73_473_448, 11.6, 82.5),
}

_P, _A, _F = "pooling", "attention", "spatial_fc"

# mixers, position embeddings, norm, eval crop, parameters, GMACs, top-1
_HYBRIDS = {
    "metaformer_id_s12":
        (("identity",) * 4, (), "group_norm", 0.9, 11_915_176, 1.8, 74.3),
    "metaformer_pppa_s12_224":
        ((_P, _P, _P, _A), (4,), "layer_norm", 0.95, 14_038_440, 1.9, 78.3),
    "metaformer_ppaa_s12_224":
        ((_P, _P, _A, _A), (3,), "layer_norm", 0.95, 16_535_592, 2.5, 81.0),
    "metaformer_pppf_s12_224":
        ((_P, _P, _P, _F), (), "group_norm", 0.9, 11_919_978, 1.8, 77.5),
    "metaformer_ppff_s12_224":
        ((_P, _P, _F, _F), (), "group_norm", 0.95, 12_150_474, 1.9, 77.9),
}


def _spec(name, table, crop_pct, n_params, gmacs, top1, **overrides):
  return ModelSpec(
      name=name, family="poolformer",
      module="metaformer_jax.models.metaformer:MetaFormer",
      settings=settings.MetaFormer(**overrides), n_params=n_params,
      gmacs=gmacs, top1=top1, crop_pct=crop_pct,
      source=f"arXiv 2111.11418, table {table}",
      checkpoint="https://github.com/sail-sg/poolformer/releases/download/v1.0/"
      f"{name}.pth.tar")


MODELS = {
    f"poolformer_{size}": _spec(f"poolformer_{size}", 1, *row, **SIZES[size],
                                layer_scale_init=layer_scale_init)
    for size, (layer_scale_init, *row) in _POOLFORMERS.items()
} | {
    name: _spec(name, 5, *row, **SIZES["s12"], token_mixers=token_mixers,
                position_embeddings=embedded, norm=norm)
    for name, (token_mixers, embedded, norm, *row) in _HYBRIDS.items()
}

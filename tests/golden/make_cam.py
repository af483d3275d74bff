"""Writes cam.npz: class activation maps of pytorch-grad-cam 1.5.7.

    python tests/golden/make_cam.py --poolformer=DIR

DIR is a clone of sail-sg/poolformer. Wants torch, timm 1.0 and grad-cam. For
each call of `cam_cases` the file has NAME/map, of the layer's size, before it
is scaled but without negative values; and NAME/scaled, what the package
returns, at some of the pixels.

Eigen-CAM's sign is arbitrary: the maps are those of the package's own
`get_2d_projection_with_sign_correction`, and NAME/signed is the projection that
its EigenCAM takes, by the sign that LAPACK returned.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, LayerCAM
from pytorch_grad_cam.utils import svd_on_activations as svd
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

GOLDEN = pathlib.Path(__file__).parent
sys.path.insert(0, str(GOLDEN.parent))
import cam_cases  # noqa: E402
import make  # noqa: E402
import parity_cases  # noqa: E402


class CorrectedEigenCAM(EigenCAM):

  def get_cam_image(self, *args, **kwargs):
    self.signed = super().get_cam_image(*args, **kwargs)
    return svd.get_2d_projection_with_sign_correction(args[3])


METHODS = {"gradcam": GradCAM, "gradcam++": GradCAMPlusPlus,
           "layercam": LayerCAM, "eigencam": CorrectedEigenCAM}


def maps(model, layer, method, classes):
  """{"map", "scaled"} of one call, and "signed" of eigencam."""
  found = {}

  class Noted(METHODS[method]):

    def get_cam_image(self, *args, **kwargs):
      cam = super().get_cam_image(*args, **kwargs)
      found["map"] = np.maximum(cam, 0).astype(np.float32)
      return cam

  x = torch.from_numpy(cam_cases.images()).permute(0, 3, 1, 2).contiguous()
  with Noted(model=model, target_layers=[model.get_submodule(layer)]) as cam:
    scaled = cam(input_tensor=x,
                 targets=list(map(ClassifierOutputTarget, classes)))
    if method == "eigencam":
      found["signed"] = cam.signed
  return {**found, "scaled": scaled[:, ::cam_cases.KEPT, ::cam_cases.KEPT]}


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--poolformer", required=True, metavar="DIR")
  args = parser.parse_args()
  torch.set_num_threads(1)
  make.alias_old_timm()
  sources = {"poolformer": make.load_source("poolformer", args.poolformer)}
  arrays = {}
  for name, layers in cam_cases.LAYERS.items():
    model = make.build(parity_cases.CASES[name], sources)
    for call in cam_cases.calls(name):
      layer, method, classes = call
      for kind, array in maps(model, layers[layer], method, classes).items():
        arrays[f"{cam_cases.key(name, *call)}/{kind}"] = array
  np.savez_compressed(GOLDEN / "cam.npz", **arrays)


if __name__ == "__main__":
  main()

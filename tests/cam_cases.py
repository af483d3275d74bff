"""Class activation maps to compare with pytorch-grad-cam. No torch, no jax.

The models, their weights and the images are those of `parity_cases`;
`golden/make_cam.py` writes what the package returns for them.
"""

import parity_cases

# A case of `parity_cases`: our layer -> the original's module.
LAYERS = {
    "poolformer_s12-official": {
        "stage4": "network.6", "stage3": "network.4",
        "stage2/block1/token_mixer": "network.2.0.token_mixer"},
    "resnet18-timm": {
        "stage4": "layer4.0", "stage3/block1": "layer3.0", "stage2": "layer2"},
}

METHODS = ("gradcam", "gradcam++", "layercam", "eigencam")

# Of each image, height and width not the same; strides of 4 to 32 leave a
# remainder.
SIZE = (75, 93)

# Of the two images, in two calls.
CLASSES = ((3, 1), (7, 0))

# Maps of the image's size are kept at every fourth row and column.
KEPT = 4


def images():
  """float32 [2, *SIZE, 3]."""
  return parity_cases.images(2, *SIZE)


def calls(case):
  """(layer, method, classes) of each call; eigencam is called once a layer."""
  for layer in LAYERS[case]:
    for method in METHODS:
      for classes in CLASSES[:1] if method == "eigencam" else CLASSES:
        yield layer, method, classes


def key(case, layer, method, classes):
  """The name of a call's maps in the golden file."""
  return f"{case}/{layer}/{method}/{'-'.join(map(str, classes))}"

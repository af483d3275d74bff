"""The windows that make images smaller, as data. No jax."""

from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
  """A window that moves over an image: of a convolution, or of pooling."""

  kernel_size: int
  stride: int
  padding: int

  def n_outputs(self, n: int) -> int:
    """Its places along a side of n pixels."""
    return (n + 2 * self.padding - self.kernel_size) // self.stride + 1


class Stem(NamedTuple):
  """How a ResNet begins.

  Attributes:
    convs: windows of its convolutions.
    widths: their channels, in units of the first stage's width.
    pool: window of the maximum that follows.
  """

  convs: tuple[Window, ...]
  widths: tuple[float, ...]
  pool: Window


RESNET_STEMS = {
    "7x7": Stem((Window(7, 2, 3),), (1,), Window(3, 2, 1)),
    "3x3": Stem((Window(3, 2, 1), Window(3, 1, 1), Window(3, 1, 1)),
                (0.5, 0.5, 1), Window(3, 2, 1)),
}


def of_stages(first: Sequence[Window], other: Window,
              n: int) -> dict[str, tuple[Window, ...]]:
  """Those that the first of n stages begins with, and each of the others."""
  return {f"stage{i + 1}": (other,) if i else tuple(first) for i in range(n)}

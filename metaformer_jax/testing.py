"""Tests of a user's own parts, for pytest:

    from metaformer_jax import testing

    class TestShift(testing.MixerTest):
      mixer = "my_mixers:Shift"
"""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from metaformer_jax.models import check_mixer


class MixerTest:
  """Tests the contract of token mixers, a test for each part.

  Attributes:
    mixer: a factory, its import path, or a name in `mixers.MIXERS`.
    dim: channels.
    size: height and width of the images in pixels.
  """

  mixer: ClassVar[str | Callable[..., Any]]
  dim: ClassVar[int] = 64
  size: ClassVar[tuple[int, int]] = (9, 8)

  @pytest.mark.parametrize("check", check_mixer.CHECKS)
  def test_contract(self, check: str) -> None:
    mixer = vars(type(self))["mixer"]  # A function must not become a method.
    check_mixer.check_mixer(mixer, dim=self.dim, size=self.size,
                            checks=[check])

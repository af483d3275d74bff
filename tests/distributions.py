"""Whether samples are of the same distribution."""

import math

import numpy as np


def ks(got, want):
  """Kolmogorov-Smirnov's two-sample statistic over its 0.1 % critical value."""
  at = np.concatenate([got, want])
  one, other = (np.searchsorted(np.sort(v), at, side="right") / len(v)
                for v in (got, want))
  critical = 1.95 * math.sqrt((len(got) + len(want)) / len(got) / len(want))
  return np.abs(one - other).max() / critical

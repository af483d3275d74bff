"""What is drawn for training: counts, chance, keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaformer_jax.ops import matching, sampling


@functools.cache
def function(n, fraction):
  return jax.jit(jax.vmap(functools.partial(
      sampling.sample, n=n, positive_fraction=fraction), (0, None)))


def draws(matches, n, fraction, n_keys=1, seed=0):
  """Of each key: index, is_positive, is_valid."""
  keys = jax.random.split(jax.random.key(seed), n_keys)
  return map(np.asarray, function(n, fraction)(
      keys, jnp.array(matches, jnp.int32)))


def mixed(n_positive, n_negative, n_ignored):
  """In random order; positives of several objects."""
  rng = np.random.default_rng(0)
  return rng.permutation(np.concatenate([
      rng.integers(0, 9, n_positive), np.full(n_negative, matching.NEGATIVE),
      np.full(n_ignored, matching.IGNORED)]))


@pytest.mark.parametrize("numbers", [
    (30, 200, 70), (3, 297, 0), (0, 300, 0), (300, 0, 0), (0, 0, 300),
    (5, 4, 291), (120, 3, 177), (1, 1, 0)])
@pytest.mark.parametrize("fraction", (0.25, 0.5, 0.0, 1.0))
def test_counts(numbers, fraction):
  """As many positives as are allowed, then as many negatives as there are."""
  n = 64
  matches = mixed(*numbers)
  for index, positive, valid in zip(*draws(matches, n, fraction, n_keys=3)):
    n_positive = min(numbers[0], int(n * fraction))
    n_negative = min(numbers[1], n - n_positive)
    row = np.arange(n)
    np.testing.assert_array_equal(positive, row < n_positive)
    np.testing.assert_array_equal(valid, row < n_positive + n_negative)
    assert (matches[index[positive]] >= 0).all()
    assert (matches[index[valid & ~positive]] == matching.NEGATIVE).all()
    assert len(set(index[valid])) == valid.sum()
    assert not index[~valid].any()


def test_every_one_is_equally_probable():
  """Chi-square of 2,000 draws; they are those of fixed keys."""
  matches, n, n_keys = mixed(40, 120, 20), 32, 2000
  index, positive, valid = draws(matches, n, 0.25, n_keys)
  assert valid.all() and (positive.sum(1) == 8).all()
  for kind, chosen, n_drawn in ((matches >= 0, positive, 8),
                                (matches == -1, ~positive, 24)):
    counts = np.bincount(index[chosen], minlength=len(matches))[kind]
    assert counts.sum() == n_keys * n_drawn
    p = n_drawn / len(counts)
    # Drawn without replacement: k - 1 degrees of freedom, after this factor.
    k = len(counts)
    chi2 = ((counts - n_keys * p)**2 / (n_keys * p * (1 - p))).sum() * (
        (k - 1) / k)
    assert abs(chi2 - (k - 1)) < 3.5 * np.sqrt(2 * (k - 1))


def test_pairs_are_drawn_independently():
  """Of two, together: as often as subsets of equal probability have them."""
  index, _, _ = draws(np.full(12, matching.NEGATIVE), 4, 0.5, 3000)
  drawn = (index[..., None] == np.arange(12)).any(1).astype(float)
  together = (drawn.T @ drawn)[np.triu_indices(12, 1)] / len(drawn)
  expected = 4 / 12 * 3 / 11
  assert abs(together - expected).max() < 5 * np.sqrt(expected / len(drawn))


def test_the_key_decides():
  matches = mixed(100, 400, 0)
  first, again, other = (next(draws(matches, 64, 0.5, seed=seed))[0]
                         for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert len(set(first) & set(other)) < 40

"""Top-1, top-5 and loss of a classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


class TopK:
  """Fractions of examples whose label is the first, or among the first five.

  Among equal logits the lower class ranks first. With fewer than five classes
  "top5" counts all of them. The loss is plain cross-entropy.

  With "labels", int [B, L] padded by -1, any of an example's labels is correct,
  and examples without labels are omitted (ImageNet-ReaL); the loss is still
  that of "label".
  """

  def __init__(self):
    self.reset()

  def reset(self) -> None:
    self._sums = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "n_examples": 0.0}

  def statistics(self, outputs: jax.Array, batch) -> dict[str, jax.Array]:
    """Sums over the valid examples of logits [B, C] and labels [B]."""
    label, valid = batch["label"], batch["mask"]
    labels = batch.get("labels", label[:, None])
    valid &= (labels >= 0).any(-1)
    mask = valid.astype(jnp.float32)
    _, ranked = jax.lax.top_k(outputs, min(5, outputs.shape[-1]))
    hits = (ranked[:, :, None] == labels[:, None, :]).any(-1)
    # where: the loss of a padding example may be anything.
    loss = jnp.where(
        valid,
        optax.softmax_cross_entropy_with_integer_labels(outputs, label), 0)
    return {
        "top1": (hits[:, 0] * mask).sum(),
        "top5": (hits.any(-1) * mask).sum(),
        "loss": loss.sum(),
        "n_examples": mask.sum(),
    }

  def update(self, statistics: dict[str, np.ndarray]) -> None:
    for name, value in statistics.items():
      self._sums[name] += float(value)

  def result(self) -> dict[str, float]:
    n = self._sums["n_examples"]
    return {name: value / n for name, value in self._sums.items()
            if name != "n_examples"} | {"n_examples": int(n)}

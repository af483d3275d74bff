"""Operations of semantic segmentation in plain NumPy, image by image."""

import numpy as np


def resize(x, height, width):
  """Bilinear, align_corners=False: [h, w, C] -> [height, width, C]."""

  def along(x, n):
    out = []
    for i in range(n):
      source = max((i + 0.5) * len(x) / n - 0.5, 0)
      low = int(source)
      high = min(low + 1, len(x) - 1)
      out.append(x[low] + (x[high] - x[low]) * (source - low))
    return np.stack(out)

  rows = along(x.astype(np.float64), height)
  return along(rows.swapaxes(0, 1), width).swapaxes(0, 1)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def pixel_losses(logits, label, ignore=255):
  """Cross-entropy of each pixel, 0 where it is ignored."""
  log_p = np.log(softmax(logits.astype(np.float64)))
  counts = label != ignore
  found = np.take_along_axis(
      log_p, np.where(counts, label, 0)[..., None].astype(int), -1)[..., 0]
  return np.where(counts, -found, 0)


def slide(fn, image, window, stride):
  """mmsegmentation's slide_inference for one image [H, W, C]."""
  (h, w), (window_h, window_w), (step_h, step_w) = (
      image.shape[:2], window, stride)
  total, count = 0, np.zeros((h, w, 1))
  for i in range(max(h - window_h + step_h - 1, 0) // step_h + 1):
    for j in range(max(w - window_w + step_w - 1, 0) // step_w + 1):
      bottom = min(i * step_h + window_h, h)
      right = min(j * step_w + window_w, w)
      where = np.s_[max(bottom - window_h, 0):bottom,
                    max(right - window_w, 0):right]
      found = fn(image[where])
      padded = np.zeros((h, w, found.shape[-1]))
      padded[where] = found
      total, count[where] = total + padded, count[where] + 1
  return total / count


def measures(pairs, num_classes):
  """(mIoU, mean accuracy, pixel accuracy) of (label, prediction) pairs."""
  label, found = (np.concatenate([p[i].ravel() for p in pairs])
                  for i in (0, 1))
  kept = label < num_classes
  label, found = label[kept], found[kept]
  ious, accuracies = [], []
  for c in range(num_classes):
    both, either = ((label == c) & (found == c)), (label == c) | (found == c)
    if either.any():
      ious.append(both.sum() / either.sum())
    if (label == c).any():
      accuracies.append(both.sum() / (label == c).sum())
  return np.mean(ious), np.mean(accuracies), (label == found).mean()

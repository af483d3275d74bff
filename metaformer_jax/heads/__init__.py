"""Decoders of dense tasks, for the features of any backbone.

`maps` are the backbone's outputs, the finest first: [[B, h, w, C], ...], each
with half as many pixels along a side as the one before. `masks` are theirs,
bool [B, h, w], or None each; the images begin at the top left. Whatever is in
the padding is ignored, and what a decoder returns there is undefined: on any
canvas, the valid part is that of the image alone.

Sources: mmdetection 2.19 and mmsegmentation 0.19, with which the official
PoolFormer trains.
"""

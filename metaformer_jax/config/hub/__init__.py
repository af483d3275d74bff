"""Folders of weights as Hugging Face transformers and timm have them.

Their config.json, and the files beside it, as an experiment and back.
"""

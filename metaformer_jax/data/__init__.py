"""Sources, transforms and the loader; the only place that decodes an image."""

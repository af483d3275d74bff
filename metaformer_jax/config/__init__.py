"""The experiment as typed data; no jax and no data code."""

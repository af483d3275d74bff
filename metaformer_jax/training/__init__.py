"""The training loop and what it is made of; knows tasks only as a protocol."""

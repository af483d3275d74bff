"""Pure numerics with static shapes."""

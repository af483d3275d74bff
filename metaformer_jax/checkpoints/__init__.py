"""What is saved, whether it is whole, and how a state starts."""

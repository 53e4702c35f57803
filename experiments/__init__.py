"""The experiments, see README.md: what the method is worth, and what it gives away."""

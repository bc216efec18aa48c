"""How fast kernels and models are, and how that is measured."""

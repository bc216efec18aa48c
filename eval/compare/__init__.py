"""Compare architectures of one size, on the same tokens in the same order, and write the report."""

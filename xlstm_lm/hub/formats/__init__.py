"""Formats that models are written to or read from, each with its table of names."""

"""How far back the gradient of a loss reaches: `python -m eval.gradient_reach`."""

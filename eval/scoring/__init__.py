"""How good a model is: loss of documents, accuracy on tasks."""

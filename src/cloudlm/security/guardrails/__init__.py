"""What may go into a model and come out of it, found in text that may still be arriving."""

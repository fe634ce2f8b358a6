"""Texts: the built-in world, readers of user files, and the way from texts to token batches."""

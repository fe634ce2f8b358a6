"""Losses, recall and the statistics of both."""

"""Attacks that try to bring forgotten knowledge back, and the controls they are read against."""

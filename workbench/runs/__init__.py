"""Runs: their configuration, folder, models, stages and tables; what every experiment is run
with.
"""

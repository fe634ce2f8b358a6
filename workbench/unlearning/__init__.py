"""Unlearning: objectives, step rules, recipes, the trainer, and the match to one disruption
budget.
"""

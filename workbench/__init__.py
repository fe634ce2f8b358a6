"""The unlearning workbench: what did unlearning do inside a model, and will it survive?"""

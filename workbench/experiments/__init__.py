"""Configuration, stages, run folders, claims: the experiments that join the parts."""

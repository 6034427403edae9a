"""Recipes, one YAML file each: the fields of a run, and how they and the words of a command line are read."""

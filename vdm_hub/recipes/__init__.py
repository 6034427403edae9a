"""Recipes: one YAML file each, with the fields of `vdm_hub.training.configuration` as flat keys."""

"""Recipes: one YAML file each, with the fields of `vdm_hub.recipes.configuration` as flat keys."""

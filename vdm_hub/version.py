"""The version, on its own, so that it can be read without importing anything."""

__version__ = "0.1.0"
"""The version of vdm_hub, as semantic versioning has it."""

# The package is on no index, so nothing promises that pip finds it by its name.
HOW_TO_INSTALL = "`pip install .` in a clone of its source, or `pip install` of its wheel"

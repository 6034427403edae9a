"""Spaces of the Hub: a Gradio app that shows a model and measures what a visitor brings, written or pushed whole."""

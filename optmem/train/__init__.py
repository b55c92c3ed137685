"""Labelled pages that we draw, the trainer, and what it needs.  Nothing here is imported by inference."""

"""Optical memory for language models: text as pages, pages as vision tokens, tokens read back on demand."""

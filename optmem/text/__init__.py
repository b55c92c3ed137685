"""Text: token counts, and later tokenizers and prompts."""

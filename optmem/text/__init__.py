"""Text: tokenizers and token counts, prompts and the repetition guard, and what a model's answer says."""

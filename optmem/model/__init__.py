"""The models: pixels to vision tokens, vision tokens to text.  One set of modules, named by its configuration."""

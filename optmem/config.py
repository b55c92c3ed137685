"""Settings as small frozen dataclasses, checked when they are made."""

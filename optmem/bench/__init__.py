"""What the parts are good for, measured beside what others would do: suites that make their own texts, each a command."""

"""Entry points that operators start; each parses its configuration and runs one service."""

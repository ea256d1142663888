"""What operators start; each script parses its configuration and runs one service."""

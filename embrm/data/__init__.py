"""Preference data: reads files and hub datasets into one schema of responses, pairs and groups."""

"""Preference data: from files and hub datasets to canonical responses, pairs and groups."""

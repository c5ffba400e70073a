"""What is adapted: episodes, requirements, and one room for each field."""

"""What is adapted: the task protocol, episodes, requirements, and one package for each field."""

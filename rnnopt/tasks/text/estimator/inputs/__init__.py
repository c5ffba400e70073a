"""What users give: texts, labels and settings, checked."""

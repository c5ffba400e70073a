"""Text classification: the classifier, its tasks, and how an episode starts."""

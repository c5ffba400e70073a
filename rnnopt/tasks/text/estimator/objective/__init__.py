"""What a classifier's labels ask of it: one label a text, or several."""

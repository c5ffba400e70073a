"""Labelled texts: files, corpora, splits of classes, sources, the embedded corpus."""

"""`TextClassifier`: a classifier with the habits of scikit-learn, from texts and labels alone."""

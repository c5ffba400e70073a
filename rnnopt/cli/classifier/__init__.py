"""The commands of a `rnnopt.TextClassifier`: fit, predict, evaluate."""

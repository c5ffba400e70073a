"""Update rules: the protocol, classical rules, the LSTM and its features, and rule files."""

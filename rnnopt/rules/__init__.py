"""What a step is: the protocol, classical rules, the LSTM, its features, and rule files."""

"""The pretrained encoder: loading, LoRA, layers, tokens, and what frozen layers make of a text."""

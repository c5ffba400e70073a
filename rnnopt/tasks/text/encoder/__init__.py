"""The pretrained encoder: loading, LoRA, layers, tokens, and the outputs of frozen layers."""

"""The text side of CLIP: tokenizer, tower, prompts."""

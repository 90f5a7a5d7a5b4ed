"""Text sources to documents (`sources`), documents to token sequences (`tokens`)."""

"""Floor 0: the vocabulary. Imports numpy, pydantic and yaml, and nothing of ours from above."""

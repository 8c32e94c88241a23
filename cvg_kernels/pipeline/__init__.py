"""What a pipeline is asked for and how it is followed: prompts, words and tokens."""

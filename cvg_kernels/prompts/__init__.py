"""The words of a prompt: which ones it is about, and the tokens that stand for them."""

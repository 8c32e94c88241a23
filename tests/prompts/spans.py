"""What tokens are found for a word, and what they stand for."""

from __future__ import annotations

from cvg_kernels.prompts.tokens import EncodedText, TokenSpan


def ids(tokenizer, prompt, *words):
    return [span.ids for span in EncodedText.of_prompt(tokenizer, prompt).find(words)]


def characters(text: EncodedText, span: TokenSpan) -> str:
    """What the tokens of a word stand for."""
    spans = [text.offsets[at] for at in span.ids]
    return text.text[min(low for low, _ in spans) : max(high for _, high in spans)]


def found(text: EncodedText, word) -> str:
    (span,) = text.find([word])
    return characters(text, span)


def in_encoder(tokenizer, prompt: str) -> EncodedText:
    """The prompt as read from the ids of a padded sequence alone."""
    padded = tokenizer(prompt, padding="max_length", truncation=True, max_length=77)
    return EncodedText.of_ids(tokenizer, padded.input_ids)

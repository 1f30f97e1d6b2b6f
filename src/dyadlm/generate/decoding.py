"""Tokens to text as they come, never showing half a character."""

from dyadlm.data.encoding import AnyTokenizer

INCOMPLETE = "\ufffd"
# Without one clean end in so many tokens the text is noise; start afresh rather than remember it all.
MOST_HELD = 64


class IncrementalDecoder:
    """`push` each token; the pieces it returns, and at last `finish`, add up to the decoded text.

    What a last, unfinished character is decoded to is held back. The tokens of the piece before are decoded
    along, since some tokenizers write a token differently at the beginning of a text.
    """

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._known = 0  # tokens at the beginning that were shown with the piece before
        self._shown = 0  # characters of the decoded tokens that were shown

    def push(self, token: int) -> str:
        """The text that the token decides, perhaps empty."""
        self._tokens.append(token)
        text = self._decode()
        unfinished = text.endswith(INCOMPLETE)
        piece, self._shown = text[self._shown : len(text) - unfinished], len(text) - unfinished
        if not unfinished:
            self._tokens = self._tokens[self._known :]
            self._known, self._shown = len(self._tokens), len(self._decode())
        elif len(self._tokens) > MOST_HELD:
            piece += self.finish()
        return piece

    def finish(self) -> str:
        """What is still held back, as far as it can be read."""
        rest = self._decode()[self._shown :]
        self._tokens, self._known, self._shown = [], 0, 0
        return rest

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

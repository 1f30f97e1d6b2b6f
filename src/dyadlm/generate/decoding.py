"""Tokens to text as they come, never showing half a character."""

from dyadlm.data.encoding import AnyTokenizer

INCOMPLETE = "\ufffd"
# An unfinished character has up to three bytes, each of which some tokenizers write as one INCOMPLETE (Llama 2, Gemma).
MOST_INCOMPLETE = 3
# Without one clean end in so many tokens the text is noise; start afresh rather than remember it all.
MOST_HELD = 64


class IncrementalDecoder:
    """`push` each token; the pieces it returns, and at last `finish`, add up to the decoded text.

    What a last, unfinished character is decoded to is held back. The tokens of the piece before are decoded
    along, since some tokenizers write a token differently at the beginning of a text. Those that fall back to bytes
    read a run of bytes as a whole: a byte too few unmakes the characters before it, until the next one comes.
    """

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._known = 0  # tokens at the beginning that were shown with the piece before
        self._shown = ""  # of the text of the tokens

    def push(self, token: int) -> str:
        """The text that the token decides, perhaps empty."""
        self._tokens.append(token)
        text = self._decode()
        held = min(len(text) - len(text.rstrip(INCOMPLETE)), MOST_INCOMPLETE)
        piece = ""
        if text.startswith(self._shown):
            piece = text[len(self._shown) : len(text) - held]
            self._shown += piece
            if not held:
                self._tokens = self._tokens[self._known :]
                self._known, self._shown = len(self._tokens), self._decode()
        if len(self._tokens) > MOST_HELD:
            piece += self.finish()
        return piece

    def finish(self) -> str:
        """What is still held back, as far as it can be read."""
        rest = self._decode()[len(self._shown) :]
        self._tokens, self._known, self._shown = [], 0, ""
        return rest

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

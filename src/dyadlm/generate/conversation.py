"""A conversation with a session: each turn reads only what is new; turns are taken back, forked, saved and loaded.

A turn is what a person says and what the model writes after it. Plain turns continue one text. Turns of a chat stand in
the chat template of the model's tokenizer (`dyadlm.data.chat.ChatTurns`).
"""

from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dyadlm.data.encoding import AnyTokenizer
from dyadlm.errors import UserError
from dyadlm.files import require_new, require_writable
from dyadlm.generate.decoding import IncrementalDecoder
from dyadlm.generate.sampling import Sampling
from dyadlm.generate.session import Session
from dyadlm.values import coerce, nearest

if TYPE_CHECKING:
    from dyadlm.data.chat import ChatTurns

# Turns of a branch that can be taken back, and branches: each holds a state.
MOST_UNDONE, MOST_BRANCHES = 16, 32
FIRST_BRANCH = "main"


@dataclass(frozen=True)
class Settings:
    """How answers are written. temperature, top_k, top_p, seed: as in `Sampling`; to the seed the number of the turn is
    added. max_new_tokens: most tokens of an answer. stop: texts that end it.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.sampling(0)
        if self.max_new_tokens < 1:
            raise UserError(f"An answer has at least 1 token (max_new_tokens), not {self.max_new_tokens}.")
        if not all(self.stop):
            raise UserError("A stop string has at least one character.")

    def sampling(self, turn: int) -> Sampling:
        """What the tokens of a turn are drawn by; turns are numbered from 0."""
        seed = self.seed if self.seed is None or not turn else min(self.seed + turn, 2**64 - 1)
        return Sampling(self.temperature, self.top_k, self.top_p, seed)

    def changed(self, name: str, text: str) -> "Settings":
        """With one of them changed; text: its value as YAML. Raises `UserError` for a name or value there cannot be."""
        kinds: dict[str, Any] = {entry.name: entry.type for entry in fields(self)}
        if name not in kinds:
            raise UserError(f"There is no setting {name!r}{nearest(name, kinds)}.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"The value of {name} cannot be read: {text!r}.") from error
        if name == "stop":
            found = coerce([value] if isinstance(value, str) else value or [], list[str], name)
            return replace(self, stop=tuple(found))
        return replace(self, **{name: coerce(value, kinds[name], name)})


@dataclass
class Branch:
    """One way that a conversation went. turns: so far, since the program began. unsaved: turns since it was last saved.

    before: what `Conversation.undo` goes back to, the newest last. here: where it stands while another branch goes on.
    """

    turns: int = 0
    unsaved: int = 0
    before: deque[tuple[Any, int, int]] = field(default_factory=lambda: deque(maxlen=MOST_UNDONE))
    here: Any = None


class Conversation:
    """Turns with one model, whose weights are loaded once, in one or more branches.

    settings: how answers are written; may be changed between turns. branch: the name of the one that goes on.
    tokens_read: of all turns, without what the model wrote.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: AnyTokenizer,
        chat: "ChatTurns | None" = None,
        settings: Settings | None = None,
    ):
        """session: at its beginning, or after a saved state. chat: what stands around turns; None: they are plain."""
        self.session, self.settings, self.tokens_read = session, settings or Settings(), 0
        self.branch, self.branches = FIRST_BRANCH, {FIRST_BRANCH: Branch()}
        self._tokenizer, self._chat = tokenizer, chat
        self._decoder = IncrementalDecoder(tokenizer)
        self._own_files: set[Path] = set()  # which may be replaced
        if chat is not None:
            session.end_tokens |= chat.end_tokens

    def say(self, text: str) -> Generator[str]:
        """Read a text and write the answer, yielding it as it comes. An empty text goes on with the last answer.

        A character that the answer leaves unfinished is held back, and comes with the first piece when it goes on.
        What was read and written by the time it is closed stays. On an error the turn is taken back. Raises `UserError`
        where there is nothing to go on from, and as `Session.write` does.
        """
        if not text and not self.session.predicts:
            raise UserError("There is nothing to go on from; write a text of at least one character.")
        branch = self._now
        branch.before.append((self.session.snapshot(), branch.turns, branch.unsaved))
        try:
            if text:
                self._decoder = IncrementalDecoder(self._tokenizer)
                ids = self._ids(text)
                self.session.read(ids)
                self.tokens_read += len(ids)
            s, sampling = self.settings, self.settings.sampling(branch.turns)
            branch.turns, branch.unsaved = branch.turns + 1, branch.unsaved + 1
            with closing(self.session.write(s.max_new_tokens, sampling, s.stop, decoder=self._decoder)) as pieces:
                yield from pieces
        except GeneratorExit:
            raise
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Go back to before the last turn, or the last load. Raises `UserError` where nothing is kept to go back to."""
        branch = self._now
        if not branch.before:
            raise UserError(f"There is no turn to take back; the last {MOST_UNDONE} of a branch can be.")
        snapshot, branch.turns, branch.unsaved = branch.before.pop()
        self._stand(snapshot)

    def fork(self, name: str | None = None) -> str:
        """Begin a new branch here and go on in it; the old one stays where it is. Returns the name.

        name: None takes a free one. Raises `UserError` for a name that is taken, or too many branches.
        """
        if len(self.branches) >= MOST_BRANCHES:
            raise UserError(f"There are {MOST_BRANCHES} branches, and no more are kept.")
        name = name or next(f"fork-{n}" for n in range(1, MOST_BRANCHES + 1) if f"fork-{n}" not in self.branches)
        if name in self.branches:
            raise UserError(f"There is a branch {name!r} already; choose another name, or /switch to it.")
        old = self._now
        old.here = self.session.snapshot()
        self.branches[name] = Branch(old.turns, old.unsaved, old.before.copy())
        self.branch = name
        return name

    def switch(self, name: str) -> None:
        """Go on in another branch. Raises `UserError` if there is none of that name."""
        if name not in self.branches:
            raise UserError(f"There is no branch {name!r}{nearest(name, self.branches)}.")
        if name != self.branch:
            self._now.here = self.session.snapshot()
            self.branch = name
            self._stand(self._now.here)
            self._now.here = None

    def save(self, path: Path) -> None:
        """Write the state of this branch. Raises `UserError` if the file is there and is none that this conversation
        wrote or loaded, or if the model has no state that can be saved."""
        if path.absolute() not in self._own_files:
            require_new(path, "the state")
        require_writable(path, "the state")
        self.session.save(path)
        self._own_files.add(path.absolute())
        self._now.unsaved = 0

    def load(self, path: Path) -> None:
        """Go on from a saved state in this branch; `undo` takes that back. Raises `UserError` for a file that does not
        fit."""
        branch, kept = self._now, self.session.snapshot()
        try:
            self.session.load(path)
        except UserError:
            self._stand(kept)
            raise
        branch.before.append((kept, branch.turns, branch.unsaved))
        branch.turns, branch.unsaved = 0, 0
        self._own_files.add(path.absolute())
        self._decoder = IncrementalDecoder(self._tokenizer)

    @property
    def turns(self) -> int:
        """Turns of this branch, since the program began or the last load."""
        return self._now.turns

    @property
    def unsaved(self) -> dict[str, int]:
        """Branches with turns that were not saved, and how many; none where the model has no state to be saved."""
        if self.session.state_bytes is None:
            return {}
        return {name: branch.unsaved for name, branch in self.branches.items() if branch.unsaved}

    @property
    def _now(self) -> Branch:
        return self.branches[self.branch]

    def _stand(self, snapshot: Any) -> None:
        self.session.restore(snapshot)
        self._decoder = IncrementalDecoder(self._tokenizer)

    def _ids(self, text: str) -> list[int]:
        if self._chat is not None:
            return self._chat.ids(text, first=self.session.begins)
        return list(self._tokenizer(text, add_special_tokens=self.session.begins)["input_ids"])

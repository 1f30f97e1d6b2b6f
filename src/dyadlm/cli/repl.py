"""`dyadlm repl` and `dyadlm chat`: write with a model turn by turn, the model loaded once and its state kept."""

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dyadlm.cli.shared import (
    SHORT_ANSWER,
    Device,
    Dtype,
    Fields,
    MaxNewTokens,
    Memory,
    MemoryEntries,
    Model,
    Raw,
    Seed,
    Slots,
    StateIn,
    Stop,
    Temperature,
    TopK,
    TopP,
    as_shown,
    errors,
    load_to_read,
    memory_for,
    require_entries,
    standard_input,
)
from dyadlm.cli.stopping import SIGNALS, Interrupts, Stopped, Stops, ending_well
from dyadlm.errors import UserError
from dyadlm.files import printable

if TYPE_CHECKING:
    from dyadlm.data.chat import ChatTurns
    from dyadlm.generate.conversation import Conversation, Settings

# What stands behind a command, and what it does.
COMMANDS = {
    "/help": ("", "show this list"),
    "/undo": ("", "go back to before the last turn"),
    "/fork": ("[NAME]", "begin a new branch here and go on in it"),
    "/switch": ("NAME", "go on in another branch"),
    "/save": ("FILE", "save the state, for /load or --state-in"),
    "/load": ("FILE", "go on from a state that /save or --state-out wrote"),
    "/set": ("[NAME VALUE]", "change how answers are written, or show it"),
    "/state": ("", "show the branches, and the size of the state"),
    "/quit": ("", "end"),
}
HELP = (
    "An empty line goes on with the last answer. Alt-Enter begins a new line; where the input is no terminal, a \\ at "
    "the end of a line does. To begin a turn with a slash, type two. Ctrl-C stops an answer, Ctrl-D ends."
)
StateOut = Annotated[Path | None, typer.Option(metavar="FILE", help="Save the state of the last branch at the end.")]


def repl(
    model: Model,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = None,
    stop: Stop = None,
    state_in: StateIn = None,
    state_out: StateOut = None,
    slots: Slots = "all",
    memory: Memory = False,
    memory_entries: MemoryEntries = None,
    raw: Raw = False,
    fields: Fields = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue a text turn by turn: the model reads what you write, and writes on.

    Each turn reads only what is new. /help lists the commands. Where the input is no terminal, each line is a turn.
    """
    from dyadlm.generate.conversation import Settings

    settings = Settings(temperature, top_k, top_p, seed, max_new_tokens, tuple(stop or ()))
    _converse(
        model, None, settings, (state_in, state_out), (memory, memory_entries), slots, raw, (device, dtype, fields)
    )


def chat(
    model: Model,
    system: Annotated[str, typer.Option(metavar="TEXT", help="A message of the system before the first turn.")] = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = None,
    stop: Stop = None,
    state_in: StateIn = None,
    state_out: StateOut = None,
    slots: Slots = "all",
    memory: Memory = False,
    memory_entries: MemoryEntries = None,
    raw: Raw = False,
    fields: Fields = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model that was trained on conversations, in the chat template of its tokenizer.

    As `dyadlm repl`, but each turn is a message of the user, and the model answers.
    """
    from dyadlm.generate.conversation import Settings

    settings = Settings(temperature, top_k, top_p, seed, max_new_tokens, tuple(stop or ()))
    _converse(
        model, system, settings, (state_in, state_out), (memory, memory_entries), slots, raw, (device, dtype, fields)
    )


def _converse(
    name: str,
    system: str | None,
    settings: "Settings",
    states: tuple[Path | None, Path | None],
    memory: tuple[bool, int | None],
    slots: Slots,
    raw: bool,
    how: tuple[str, str, list[str] | None],
) -> None:
    """Load the model, and take turns until the input ends. system: None for plain text. states: in and out."""
    from dyadlm.generate import open_session
    from dyadlm.generate.conversation import Conversation
    from dyadlm.generate.states import require_state_files

    state_in, state_out = states
    require_state_files(state_in, False, state_out)
    memory_for(*memory)
    standard_input()
    loaded, tokenizer = load_to_read(name, *how, compile_after=SHORT_ANSWER)
    turns = None if system is None else _turns(name, tokenizer, system)
    remembers = memory_for(*memory, len(tokenizer))
    session = open_session(loaded, tokenizer, state_in, state_out=state_out, memory=remembers, slots=slots)
    require_entries(session, memory[1])
    conversation = Conversation(session, tokenizer, turns, settings)
    interactive = sys.stdin.isatty()
    failed = warned = False
    try:
        with ending_well(session.saving(state_out), state_out) as stops:
            for text in stops.while_waiting(_typed(conversation) if interactive else _piped()):
                try:
                    leaves = _take(conversation, text, stops, raw)
                except UserError as error:
                    errors.print(printable(str(error)))
                    failed, leaves = True, False
                if not leaves:
                    warned = False
                elif not interactive or warned or not (unsaved := _left(conversation, state_out)):
                    break
                else:
                    errors.print(f"{_sentence(unsaved)} /save FILE saves; /quit or Ctrl-D again ends.")
                    warned = True
    finally:
        if not warned and (unsaved := _left(conversation, state_out)):
            errors.print(_sentence(unsaved))
    if failed and not interactive:
        raise typer.Exit(2)


def _take(conversation: "Conversation", text: str, stops: Stops, raw: bool) -> bool:
    """A turn or a command; whether it asks to end. Raises `UserError`."""
    if text.startswith("/") and not text.startswith("//"):
        return _command(conversation, text)
    text = text[1:] if text.startswith("//") else text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("A line of the input is not UTF-8 text, and was not read; convert it first.") from error
    _answer(conversation, text, stops, raw)
    return False


def _turns(name: str, tokenizer: object, system: str) -> "ChatTurns":
    from dyadlm.data.chat import ChatTurns
    from dyadlm.data.encoding import ByteTokenizer
    from dyadlm.data.tokenizer import load_tokenizer

    full = load_tokenizer(name) if isinstance(tokenizer, ByteTokenizer) else tokenizer
    if not getattr(full, "is_fast", False):
        raise UserError("The tokenizer of this model is none of the fast ones, which `dyadlm chat` needs; use repl.")
    if getattr(full, "chat_template", None) is None:
        raise UserError(
            f"{name} has no chat template, so it was not trained on conversations; use `dyadlm repl {name}`, or "
            "train it on conversations first."
        )
    return ChatTurns(full, system or None)  # type: ignore[arg-type]


def _answer(conversation: "Conversation", text: str, stops: Stops, raw: bool) -> None:
    """One turn. Ctrl-C ends the answer after the token that is being computed; a second one takes the turn back."""
    last, turns = "", conversation.turns
    with Interrupts() as interrupts:
        try:
            with closing(conversation.say(text)) as pieces:
                for piece in stops.after_each(interrupts.until_one(pieces)):
                    last = as_shown(piece, raw)
                    sys.stdout.write(last)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if conversation.turns > turns:
                conversation.undo()
            errors.print("Interrupted twice: the turn was taken back.")
    if not last.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()


def path_of(name: str) -> Path:
    """The path that was typed, `~` as the home directory. Raises `UserError` for the home of nobody."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name} is in the home directory of nobody here; give another file.") from error


def _command(conversation: "Conversation", line: str) -> bool:
    """Do what a line that begins with a slash asks for; whether it asks to end. Raises `UserError`."""
    from dyadlm.values import nearest

    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name not in COMMANDS:
        raise UserError(f"There is no command {name!r}{nearest(name, COMMANDS)}; /help lists them.")
    wanted, _ = COMMANDS[name]
    if rest and not wanted:
        raise UserError(f"{name} takes nothing behind it.")
    if not rest and wanted.isalpha():
        raise UserError(f"{name} needs a {wanted} behind it.")
    if name == "/save":
        conversation.save(path_of(rest))
        errors.print(f"The state is in {printable(rest)}.")
    elif name == "/load":
        conversation.load(path_of(rest))
        errors.print(f"{conversation.session.position:,} tokens were read before.")
    elif name == "/undo":
        conversation.undo()
        errors.print(f"Back at token {conversation.session.position:,}.")
    elif name == "/fork":
        errors.print(f"This is branch {printable(conversation.fork(rest or None))}.")
    elif name == "/switch":
        conversation.switch(rest)
        errors.print(f"This is branch {printable(rest)}, at token {conversation.session.position:,}.")
    elif name == "/set":
        _set(conversation, rest)
    elif name == "/state":
        _show_state(conversation)
    elif name == "/help":
        _show_help()
    return name == "/quit"


def _show_help() -> None:
    """The commands, folded at the width of the terminal."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for command, (behind, meaning) in COMMANDS.items():
        table.add_row(f"{command} {behind}", meaning)
    errors.print(table, soft_wrap=False)
    errors.print(HELP, soft_wrap=False)


def _set(conversation: "Conversation", rest: str) -> None:
    if rest:
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        if not value.strip():
            raise UserError("/set takes a name and a value, such as /set temperature 0.8.")
        conversation.settings = conversation.settings.changed(name, value.strip())
    for name, value in vars(conversation.settings).items():
        errors.print(f"{name:15} {list(value) if isinstance(value, tuple) else value}")


def _show_state(conversation: "Conversation") -> None:
    session = conversation.session
    size = "grows with the text" if session.state_bytes is None else f"{session.state_bytes:,} bytes"
    errors.print(f"position {session.position:,} tokens; state {size}; {conversation.tokens_read:,} tokens read here")
    for name, branch in conversation.branches.items():
        mark = "*" if name == conversation.branch else " "
        errors.print(f"{mark} {printable(name)}: {branch.turns} turns, {branch.unsaved} not saved")


def _left(conversation: "Conversation", state_out: Path | None) -> dict[str, int]:
    """Branches whose turns would be lost at the end, and how many turns."""
    left = conversation.unsaved
    if state_out is not None:
        left.pop(conversation.branch, None)
    return left


def _sentence(unsaved: dict[str, int]) -> str:
    told = ", ".join(f"{turns} of branch {printable(name)}" for name, turns in unsaved.items())
    return f"Turns that are not saved: {told}."


def _piped() -> Iterator[str]:
    """The lines of standard input; a backslash at the end of one joins the next to it. Bytes that are no UTF-8 are
    surrogates."""
    held = ""
    for line in standard_input():
        text = held + line.decode(errors="surrogateescape").rstrip("\r\n")
        held = text[:-1] + "\n" if text.endswith("\\") else ""
        if not held:
            yield text
    if held:
        yield held


def _typed(conversation: "Conversation") -> Iterator[str]:
    """What is typed at a prompt with a history; `/quit` at Ctrl-D."""
    ask = _prompt()
    errors.print("/help lists the commands; Ctrl-D ends.")
    while True:
        branch = conversation.branch
        try:
            yield ask("> " if branch == "main" else f"{printable(branch)}> ")
        except KeyboardInterrupt:
            errors.print("Ctrl-D or /quit ends.")
        except EOFError:
            yield "/quit"


def _prompt() -> Callable[[str], str]:
    """What asks for a line. A signal that ends the program ends the question first, which restores the terminal."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    keys.add("escape", "enter")(begin_line)
    words = WordCompleter(list(COMMANDS), sentence=True)
    session: PromptSession[str] = PromptSession(completer=words, complete_while_typing=False, key_bindings=keys)

    def ask(text: str) -> str:
        handlers = {number: signal.getsignal(number) for number in SIGNALS if number != signal.SIGINT}

        def prepare() -> None:
            loop = asyncio.get_running_loop()
            for number, handler in handlers.items():
                if handler != signal.SIG_IGN:
                    loop.add_signal_handler(number, partial(session.app.exit, exception=Stopped(number)))

        try:
            return str(session.prompt(text, pre_run=prepare))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return ask

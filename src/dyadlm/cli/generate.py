"""`dyadlm generate`: continue a prompt, printing as it goes."""

import sys
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from dyadlm.cli.shared import (
    SHORT_ANSWER,
    Device,
    Dtype,
    Fields,
    MaxNewTokens,
    Memory,
    MemoryEntries,
    MemoryScope,
    Model,
    NewDocument,
    Raw,
    Seed,
    SlotEntries,
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
    read_prompt,
    require_entries,
)
from dyadlm.cli.stopping import ending_well


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT|-", help="What to continue; `-` reads standard input.")],
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = None,
    stop: Stop = None,
    state_in: StateIn = None,
    new_document: NewDocument = False,
    state_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the state after prompt and continuation.")
    ] = None,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate",
            help="With --temperature 0, for models with a planner: read two tokens at once where it proposed both.",
        ),
    ] = False,
    slots: Slots = "all",
    slot_entries: SlotEntries = None,
    memory: Memory = False,
    memory_entries: MemoryEntries = None,
    memory_scope: MemoryScope = None,
    raw: Raw = False,
    fields: Fields = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue a prompt. A saved state replaces all the text that was read before it, of any length.

    In models with slots, --state-in FILE --new-document carries their memory into a new document.
    """
    from dyadlm.errors import UserError
    from dyadlm.generate import Sampling, open_session
    from dyadlm.generate.session import require_speculation
    from dyadlm.generate.states import require_state_files

    sampling = Sampling(temperature, top_k, top_p, seed)
    text = read_prompt(prompt)
    if not text:
        raise UserError("The prompt is empty; give at least one character.")
    require_state_files(state_in, new_document, state_out)
    memory_for(memory, memory_entries, scope=memory_scope)
    if speculate and memory:
        raise UserError("Speculation cannot use a memory; leave out --speculate or --memory.")
    loaded, tokenizer = load_to_read(model, device, dtype, fields, slot_entries, compile_after=SHORT_ANSWER)
    drafts = None
    remembers = memory_for(memory, memory_entries, len(tokenizer), memory_scope)
    if speculate:
        from dyadlm.generate.speculation import Drafts

        drafts = Drafts()
        require_speculation(loaded, sampling)
    session = open_session(loaded, tokenizer, state_in, new_document, state_out, remembers, slots)
    require_entries(session, memory_entries, memory_scope)
    session.read_prompt(text)
    pieces = session.write(max_new_tokens, sampling, stop or (), drafts)
    with ending_well(session.saving(state_out), state_out) as stops, closing(pieces):
        # The first piece before the prompt's echo: a request that turns out wrong prints nothing.
        for piece in stops.after_each(chain([text + next(pieces, "")], pieces)):
            sys.stdout.write(as_shown(piece, raw))
            sys.stdout.flush()
        sys.stdout.write("\n")
    if drafts is not None:
        errors.print(f"{drafts.accepted} of {drafts.made} tokens foreseen two ahead were right ({drafts.rate:.0%}).")

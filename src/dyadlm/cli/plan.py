"""`dyadlm plan`: what training a preset would take on GPUs that are not here."""

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from dyadlm.cli.shared import errors
from dyadlm.cli.train import duration
from dyadlm.console import print_table

KINDS = {
    "eager": "our model as `dyadlm train` ran it before it had Triton kernels, not compiled",
    "graph": "our model compiled, each step as one CUDA graph; only benchmarks do this, `dyadlm train` does not",
    "llama": "a compiled Llama with flash attention, for comparison; our model has not reached this rate",
}
GIGA, DAY = 10**9, 86_400


def plan(
    preset: Annotated[str, typer.Option(help="A new model: tiny, paper, small, base, large or xl.")],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of the run in a YAML or JSON file.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key=value ...", help="Settings of the run, as `dyadlm train` takes them."),
    ] = None,
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N ...",
            help="Numbers of GPUs. Default: those of 1, 8 and 64 that divide the windows of a step.",
        ),
    ] = None,
    memory: Annotated[float, typer.Option(metavar="GB", min=1, help="Memory of a GPU, in GB; an H100 has 80.")] = 80,
    price: Annotated[
        float | None, typer.Option(metavar="X", help="What a GPU costs for an hour, in any currency.")
    ] = None,
    efficiency: Annotated[
        float, typer.Option(metavar="X", help="Share of their speed that several GPUs keep; 1: nothing is lost.")
    ] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate memory, time and cost of a training run on 1, 8 and 64 GPUs, from rates that were measured on one.

    No GPU is needed, nothing is trained and no text is read. `dyadlm train --dry-run` measures on this machine.
    """
    from dyadlm.train import TrainSettings
    from dyadlm.train import plan as plan_run

    settings = TrainSettings.create(
        Path("run"), preset=preset, config=config, data=["any"], assignments=assignments or ()
    )
    if not json:
        errors.print("Counting operations and memory ...")
    told = plan_run(settings, gpus, efficiency, price)
    if json:
        typer.echo(json_format.dumps(told, indent=2))
    else:
        _print(told, memory * GIGA)


def _print(told: dict[str, Any], memory: float) -> None:
    typer.echo(f"parameters: {told['parameters']:,}")
    typer.echo(
        f"run: {told['tokens']:,} tokens in {told['steps']:,} steps of {told['windows_per_step']} windows of "
        f"{told['sequence_length']:,} tokens; {told['flops']:.2e} floating-point operations"
    )
    typer.echo(f"memory: {_gigabytes(told['static_memory_bytes'])} for weights, gradients and optimizer\n")
    titles = [
        "GPUs",
        "windows at once",
        "accumulation",
        "memory of a GPU",
        "with FSDP",
        f"fits in {_gigabytes(memory)}",
    ]
    rows = []
    for entry in told["gpus"]:
        whole, sharded = entry["memory_bytes"], entry["sharded_memory_bytes"]
        fits = "yes" if whole <= memory else "with FSDP" if sharded <= memory else "no"
        counts = [str(entry[name]) for name in ("gpus", "rows", "gradient_accumulation_steps")]
        rows.append([*counts, _gigabytes(whole), _gigabytes(sharded), fits])
    print_table(titles, rows, right=titles[:5])
    typer.echo(
        f"The same model on any of them: --set train.windows_per_step={told['windows_per_step']} "
        "gradient_accumulation_steps=ACCUMULATION, with the number in the table."
    )
    if told["left_out"]:
        uneven = " and ".join(map(str, told["left_out"]))
        typer.echo(
            f"{uneven} GPUs cannot share {told['windows_per_step']} windows evenly and are left out; raise "
            "gradient_accumulation_steps for them."
        )
    if any(row[-1] == "no" for row in rows):
        typer.echo("What does not fit: fewer per_device_train_batch_size, or gradient_checkpointing=true.")
    typer.echo("")
    titles = ["GPUs", "rate", "time", "GPU hours", "cost"]
    rows = []
    for entry in told["gpus"]:
        for kind, seconds in entry["seconds"].items():
            cost = _amount(entry["cost"][kind]) if entry["cost"] else ""
            rows.append([str(entry["gpus"]), kind, _time(seconds), _amount(entry["gpu_hours"][kind]), cost])
    shown = 5 if told["gpus"][0]["cost"] else 4
    print_table(titles[:shown], [row[:shown] for row in rows], right={"GPUs", "time", "GPU hours", "cost"})
    typer.echo("\nRates, measured on one GPU each, in bfloat16:")
    for kind, rate in told["rates"].items():
        where = f"{rate['gpu']}, torch {rate['torch']}, commit {rate['commit']}"
        what = f"{rate['parameters'] / 1e6:,.1f}M parameters, windows of {rate['sequence_length']:,} tokens"
        fast = f"{rate['tokens_per_second']:,} tokens/s, {rate['flops_per_second'] / 1e12:,.1f} TFLOP/s"
        typer.echo(f"  {kind}: {KINDS[kind]}; {what}; {where}: {fast}")
    lost = f"{1 - told['efficiency']:.0%}" if told["efficiency"] < 1 else "nothing"
    typer.echo(
        "Assumed, not measured: this model computes as many TFLOP/s as the measured one; your GPUs are as fast as the "
        f"measured one; several GPUs lose {lost} to each other. Evaluations and checkpoints come on top."
    )


def _gigabytes(size: float) -> str:
    return f"{size / GIGA:,.1f} GB" if size >= GIGA else f"{size / GIGA:.2g} GB"


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    return f"{seconds / DAY:,.1f} days" if seconds >= 2 * DAY else duration(seconds)

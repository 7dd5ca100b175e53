"""The command line `caddie`: verbs only. Tables for people, --json for programs; both say the same.

Exit codes: 0 done; 1 refused or failed, with the reason on stderr; 2 wrong usage; 3 no such trial or run;
4 another daemon owns the workspace.

Heavy parts (SQLAlchemy, scipy) are imported inside the verbs that need them: `caddie --help` must be instant.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from agent.adapters.workspace import Workspace
from agent.domain.errors import CaddieError, LockHeldError, NotFoundError, SpecError, WorkspaceError
from agent.domain.observations import CommandVerb
from agent.domain.runfiles import LOG
from agent.domain.specs import Metric, Spec
from agent.domain.trials import RunKind, TrialState

if TYPE_CHECKING:
    from agent.ledger.queries import LedgerReader

app = typer.Typer(
    help="Caddie: an autonomous research daemon for the best small language model under a byte budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", "-w", envvar="CADDIE_WORKSPACE", help="The working folder.", show_default=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
TrialArgument = Annotated[str, typer.Argument(help="A trial: its number, NAME, or NAME@SEED.")]
HERE = Path()


def main() -> None:
    """Entry point: turns Caddie's own errors into one clear line and an exit code."""
    try:
        app()
    except LockHeldError as error:
        _fail(error, 4)
    except NotFoundError as error:
        _fail(error, 3)
    except CaddieError as error:
        _fail(error, 1)


def _fail(error: CaddieError, code: int) -> NoReturn:
    typer.echo(f"caddie: {error}", err=True)
    raise SystemExit(code)


@app.command()
def up(  # noqa: PLR0917 - each is an option of the command line, never positional
    workspace: WorkspaceOption = HERE,
    interval: Annotated[float | None, typer.Option(help="Seconds between heartbeats; default 180.")] = None,
    once: Annotated[bool, typer.Option("--once", help="One heartbeat, then stop.")] = False,
    until_drained: Annotated[bool, typer.Option("--until-drained", help="Stop when nothing is left to do.")] = False,
    cpu_slots: Annotated[int | None, typer.Option(min=1, help="CPU slots; default: the cores here.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Log lines instead of the live view.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON record per heartbeat.")] = False,
) -> None:
    """Run the daemon in the foreground. Ctrl-C stops the daemon and leaves its runs alive."""
    from agent import foreground, tables

    report = foreground.run_daemon(
        Workspace(workspace.resolve()),
        once=once,
        until_drained=until_drained,
        view="json" if as_json else "plain" if plain else "live",
        interval_seconds=interval,
        cpu_slots=cpu_slots,
    )
    if until_drained and report is not None:
        for line in tables.left_over(report):
            typer.echo(line, err=True)
    if once and (report is None or not report.ok):
        raise typer.Exit(1)


@app.command()
def enqueue(
    files: Annotated[list[Path], typer.Argument(help="YAML specs.", exists=True, dir_okay=False)],
    workspace: WorkspaceOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Check specs and put them into the queue; all are checked before the first is queued."""
    from agent import bootstrap

    place = Workspace(workspace.resolve())
    place.create()
    queue = bootstrap.spec_queue(place)
    for file in files:
        queue.check(file)
    placed = [queue.enqueue(file) for file in files]
    _answer(as_json, placed, lambda: [f"queued {path}" for path in placed])


@app.command()
def queue(workspace: WorkspaceOption = HERE, as_json: JsonOption = False) -> None:
    """What waits: queued and paused trials in the order of launch, and files not yet taken in."""
    from agent import tables

    with _ledger(workspace) as reader:
        held = reader.trials([TrialState.QUEUED, TrialState.PAUSED])
        reasons = tables.wait_reasons(reader.heartbeats(1))
    files = sorted(path.name for path in _existing(workspace).queue.glob("*.y*ml"))
    waiting = sorted(held, key=lambda trial: (-trial.spec.priority, trial.trial_id))
    if as_json:
        told = [tables.summary(trial) | {"waiting_because": reasons.get(trial.key)} for trial in waiting]
        tables.print_json({"trials": told, "files": files})
    else:
        tables.queue(waiting, reasons, files)


@app.command()
def runs(
    workspace: WorkspaceOption = HERE,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Newest finished trials to show.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Trials, live ones first, then the newest finished ones: progress, BPB, projection, verdict."""
    from agent import tables

    with _ledger(workspace) as reader:
        trials = reader.trials()
        finished = sorted((t for t in trials if t.state is TrialState.FINISHED), key=lambda t: t.state_since)
        shown = [t for t in trials if t.state is not TrialState.FINISHED] + finished[: -limit - 1 : -1]
        projections = {trial.trial_id: reader.latest_projection(trial.trial_id) for trial in shown}
    if as_json:
        tables.print_json([tables.summary(trial, projections[trial.trial_id]) for trial in shown])
    else:
        tables.runs(shown, projections)


@app.command()
def best(
    workspace: WorkspaceOption = HERE,
    track: Annotated[str | None, typer.Option(help="Only this track, as the table names it.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="raw, ema, artifact, sliding or ttt; default: artifact where one was scored.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows per track.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """The leaderboard of each track. Scores of different tracks are never mixed."""
    from agent import tables

    with _ledger(workspace) as reader:
        board = reader.best(limit=limit, metric=_metric(metric), track=track)
    if track is not None and not board:
        raise NotFoundError(f"no track '{track}' has a score; caddie best without --track shows those that have")
    tables.print_json(board) if as_json else tables.leaderboard(board)


@app.command()
def show(trial: TrialArgument, workspace: WorkspaceOption = HERE, as_json: JsonOption = False) -> None:
    """One trial: its spec, runs, scores, projections, and every decision with the numbers it stood on."""
    from agent import tables

    with _ledger(workspace) as reader:
        found = reader.trial(trial)
        dossier = tables.Dossier(
            trial=found,
            decisions=reader.decisions(found.trial_id),
            projections=reader.projections(found.trial_id),
            events=reader.events(found.trial_id),
            commands=[command for command in reader.commands() if command.trial_id == found.trial_id],
        )
    tables.print_json(dossier) if as_json else tables.trial(dossier)


@app.command()
def heartbeats(
    workspace: WorkspaceOption = HERE,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest last.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """The last heartbeats: what was seen, projected and decided."""
    from agent import tables

    with _ledger(workspace) as reader:
        beats = reader.heartbeats(limit)
    tables.print_json(tables.heartbeat_values(beats)) if as_json else tables.heartbeats(beats)


@app.command()
def logs(  # noqa: PLR0917 - each is an option of the command line, never positional
    trial: TrialArgument,
    workspace: WorkspaceOption = HERE,
    kind: Annotated[RunKind, typer.Option(help="Which of its runs: the newest one of this kind.")] = RunKind.TRAIN,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines from the end.")] = 40,
    as_json: JsonOption = False,
) -> None:
    """The log of a trial's newest training run, or of its export or evaluation."""
    from agent import log_view, tables

    if follow and as_json:
        raise typer.BadParameter("a log that is followed has no end to close the JSON with", param_hint="--follow")
    with _ledger(workspace) as reader:
        found = reader.trial(trial)
    runs_of_kind = found.runs_of(kind)
    if not runs_of_kind:
        raise NotFoundError(f"{found.key} has no {kind} run yet, so there is no log of one")
    run = runs_of_kind[-1]
    folder = _existing(workspace).root / run.directory
    if as_json:
        tables.print_json({"path": str(folder / LOG), "lines": log_view.tail(folder / LOG, lines)})
    else:
        log_view.show(folder, lines=lines, follow=follow and run.live)


Trials = Annotated[list[str], typer.Argument(help="Trials: number, NAME, or NAME@SEED.")]


@app.command()
def stop(trials: Trials, workspace: WorkspaceOption = HERE, as_json: JsonOption = False) -> None:
    """End trials for good: TERM, time for a checkpoint, KILL."""
    _command(CommandVerb.STOP, trials, workspace, as_json)


@app.command()
def pause(trials: Trials, workspace: WorkspaceOption = HERE, as_json: JsonOption = False) -> None:
    """Checkpoint, exit, and hold until `caddie resume`; the training clock is kept."""
    _command(CommandVerb.PAUSE, trials, workspace, as_json)


@app.command()
def resume(trials: Trials, workspace: WorkspaceOption = HERE, as_json: JsonOption = False) -> None:
    """Put paused trials back into the queue."""
    _command(CommandVerb.RESUME, trials, workspace, as_json)


@app.command()
def budget(
    spec: Annotated[Path, typer.Argument(help="A YAML spec.", exists=True, dir_okay=False)],
    as_json: JsonOption = False,
) -> None:
    """Predict the artifact's bytes from a spec alone, by module. Exit code 1 if it cannot fit."""
    from agent import tables
    from agent.adapters.spec_yaml import load_spec
    from agent.decisions.budget_gate import verdict_of
    from trainer.sizing import predict_artifact

    parsed = load_spec(spec)
    if parsed.trainer is None:
        raise SpecError("a command's artifact cannot be predicted", source=spec, field="command")
    estimate = predict_artifact(parsed.train_config(parsed.seeds[0]))
    verdict = verdict_of(estimate, parsed.budget_bytes)
    if as_json:
        tables.print_json(
            {"estimate": estimate, "verdict": verdict, "fits": verdict.fits, "hopeless": verdict.hopeless}
        )
    else:
        tables.budget(estimate, verdict)
    raise typer.Exit(1 if verdict.hopeless else 0)


@app.command()
def schema(as_json: JsonOption = True) -> None:
    """The JSON Schema of a spec, for editors. Always JSON."""
    from agent import tables

    del as_json  # there is no other form of it
    tables.print_json(Spec.model_json_schema())


@app.command()
def doctor(workspace: WorkspaceOption = HERE, as_json: JsonOption = False) -> None:
    """Check this machine and workspace. Exit code 1 if something is at fault."""
    from agent import doctor as checks
    from agent import tables

    found = checks.examine(Workspace(workspace.resolve()))
    tables.print_json(found) if as_json else tables.checks(found)
    raise typer.Exit(1 if any(check.verdict is checks.Verdict.FAULT for check in found) else 0)


@app.command()
def demo(
    workspace: Annotated[Path, typer.Option("--workspace", "-w", help="Where to work.")] = Path("workspace/demo"),
    plain: Annotated[bool, typer.Option("--plain", help="Log lines instead of the live view.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with the leaderboard as JSON; all else on stderr.")
    ] = False,
) -> None:
    """The main job on text that this machine already has: specs, runs, decisions, an exported model. Minutes."""
    from agent import demo as main_job

    main_job.run(Workspace(workspace.resolve()), view="quiet" if as_json else "plain" if plain else "live")


def _existing(workspace: Path) -> Workspace:
    place = Workspace(workspace.resolve())
    if not place.queue.is_dir():
        raise WorkspaceError(f"{place.root} is no workspace. Name one with --workspace, or make it with caddie up")
    return place


def _ledger(workspace: Path) -> LedgerReader:
    place = _existing(workspace)
    if not place.database.exists():
        raise NotFoundError(f"there is no ledger at {place.database} yet; caddie up makes it")
    from agent.ledger.queries import LedgerReader

    return LedgerReader.open(place.database)


def _command(verb: CommandVerb, references: list[str], workspace: Path, as_json: bool) -> None:
    from agent.adapters.command_inbox import CommandInbox

    place = _existing(workspace)
    with _ledger(workspace) as reader:
        found = [reader.trial(reference) for reference in references]
    inbox = CommandInbox(place)
    sent = [{"trial": trial.key, "verb": verb.value, "file": str(inbox.send(verb, trial.trial_id))} for trial in found]
    when = (
        "the daemon acts within a second"
        if place.daemon_pid() is not None
        else "no daemon is running: caddie up will act on it"
    )
    _answer(as_json, sent, lambda: [f"{verb.value} {item['trial']}: asked; {when}" for item in sent])


def _metric(name: str | None) -> Metric | None:
    if name is None:
        return None
    try:
        return Metric(name)
    except ValueError:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(Metric)}", param_hint="--metric") from None


def _answer(as_json: bool, value: Any, lines: Callable[[], list[str]]) -> None:
    if as_json:
        from agent import tables

        tables.print_json(value)
    else:
        for line in lines():
            typer.echo(line)

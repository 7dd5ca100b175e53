"""What `after` asks for: which trials wait for others, and which of those waits can never end.

A name that the ledger does not know, or a circle of trials that wait for one another, ends only when a user
steps in. So does every trial that waits for one of those, or for one that is paused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from agent.domain.actions import Launch, Wait
from agent.domain.trials import TrialState
from agent.domain.views import LedgerView, TrialView


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Why a trial may not start yet."""

    why: str
    hopeless: bool = False


class After:
    """The experiments of a view as `after` sees them."""

    def __init__(self, view: LedgerView) -> None:
        self._known = view.experiment_names()
        self._unfinished = {trial.name for trial in view.trials if trial.state is not TrialState.FINISHED}
        self._paused = {trial.name for trial in view.trials if trial.state is TrialState.PAUSED}
        waiting = {
            trial.name: self._open(trial)
            for trial in view.trials
            if trial.state in {TrialState.QUEUED, TrialState.PAUSED} and trial.spec.after
        }
        self._circles = _circles(waiting)

    def hold(self, trial: TrialView) -> Hold | None:
        """None if every experiment that it waits for is finished, however that ended."""
        if not trial.spec.after:
            return None
        missing = [name for name in trial.spec.after if name not in self._known]
        if missing:
            why = (
                f"waits for {', '.join(missing)}, which the ledger does not know. "
                "Remedy: enqueue it, or stop this trial and correct `after`"
            )
            return Hold(why=why, hopeless=True)
        if circle := self._circles.get(trial.name):
            why = (
                f"waits for itself: {' after '.join(circle)}. "
                "Remedy: stop one of them, and enqueue it again without that `after`"
            )
            return Hold(why=why, hopeless=True)
        open_ones = self._open(trial)
        return Hold(why=f"waits for {', '.join(open_ones)} to finish") if open_ones else None

    def settle(self, verdicts: Iterable[Launch | Wait], queued: Mapping[int, TrialView]) -> tuple[Launch | Wait, ...]:
        """Also hopeless: who waits for a trial that is, or for one that is paused. `queued` is by trial id."""
        found = list(verdicts)
        waiting_for: dict[str, list[int]] = {}
        for position, verdict in enumerate(found):
            for name in self._open(queued[verdict.trial_id]):
                waiting_for.setdefault(name, []).append(position)
        stuck = [queued[v.trial_id].name for v in found if isinstance(v, Wait) and v.hopeless]
        stuck += self._paused
        while stuck:
            for position in waiting_for.pop(stuck.pop(), ()):
                verdict = found[position]
                if isinstance(verdict, Wait) and not verdict.hopeless:
                    found[position] = replace(verdict, hopeless=True)
                    stuck.append(queued[verdict.trial_id].name)
        return tuple(found)

    def _open(self, trial: TrialView) -> tuple[str, ...]:
        return tuple(name for name in trial.spec.after if name in self._unfinished)


def _circles(waiting: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """By name, a circle that it belongs to, written from that name back to itself. One for each name at most.

    A depth-first walk without recursion, because a chain of `after` may be longer than Python's stack.
    """
    circles: dict[str, tuple[str, ...]] = {}
    done: set[str] = set()
    for start in waiting:
        path: dict[str, None] = {}
        pending = [(start, False)]
        while pending:
            name, leaving = pending.pop()
            if leaving:
                path.pop(name)
                done.add(name)
            elif name in path:
                names = list(path)
                ring = names[names.index(name) :]
                for turn, member in enumerate(ring):
                    circles.setdefault(member, (*ring[turn:], *ring[: turn + 1]))
            elif name not in done:
                path[name] = None
                pending.append((name, True))
                pending += [(other, False) for other in waiting.get(name, ())]
    return circles

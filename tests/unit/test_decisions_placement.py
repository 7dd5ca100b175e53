"""Who starts where: placement and the budget gate."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from agent.decisions.budget_gate import size_of
from agent.decisions.placement import memory_need
from agent.domain.actions import Action, Assignment, Finish, Launch, Wait
from agent.domain.budget import BudgetVerdict
from agent.domain.observations import DeviceProcess, Devices
from agent.domain.trials import Result, RunKind, RunState, TrialState
from agent.domain.views import TrialView
from placement_views import GB, NO_GPU, NOW, command, decided, done, gpu, launched, machine, only, run, trial, waits
from trainer.sizing import fitting_micro_tokens, peak_memory_bytes


def passed(trial_id: int, **spec: Any) -> TrialView:
    """A queued command that has not waited for long."""
    return dataclasses.replace(command(trial_id, **spec), state_since=NOW)


SMALL = {"resources": {"vram_gb": 4}}


class TestPlacement:
    def test_auto_takes_a_gpu_where_there_is_one_and_a_slot_elsewhere(self) -> None:
        assert launched(only(machine(gpu()), trial(spec=SMALL))).gpu_uuids == ("GPU-0",)
        assert launched(only(NO_GPU, trial(spec=SMALL))) == Assignment(cpu_slots=1)

    def test_a_run_that_wants_the_cpu_leaves_the_gpu_alone(self) -> None:
        assert launched(only(machine(gpu()), trial(spec={"resources": {"gpus": 0, "cpus": 2}}))) == Assignment(
            cpu_slots=2
        )
        assert launched(only(machine(gpu()), trial(spec={"trainer": {"device": "cpu"}}))) == Assignment(cpu_slots=1)

    @pytest.mark.parametrize("spec", [{"resources": {"gpus": 1}}, {"trainer": {"device": "cuda"}}])
    def test_a_gpu_that_the_machine_has_not(self, spec: dict[str, Any]) -> None:
        reason = waits(only(NO_GPU, trial(spec=spec)))
        assert "no NVIDIA driver" in reason
        assert "Remedy" in reason

    def test_unknown_gpus_are_not_none(self) -> None:
        unknown = Devices(gpus=None, cpu_slots=4, note="the driver did not answer in 10 s")
        assert "did not answer" in waits(only(unknown, trial(spec=SMALL)))
        assert launched(only(unknown, trial(spec={"resources": {"gpus": 0}}))).cpu_slots == 1

    def test_other_peoples_memory_is_respected(self) -> None:
        users = (DeviceProcess(pid=321, name="jupyter", memory_bytes=None),)
        reason = waits(only(machine(gpu(used=12, processes=users)), trial(spec=SMALL)))
        assert "4.0 GB free, needs 4.0 + 0.5 GB" in reason
        assert "jupyter (pid 321)" in reason
        assert launched(only(machine(gpu(used=11.5)), trial(spec=SMALL)))

    def test_a_sick_card_takes_no_run(self) -> None:
        assert "fell off the bus" in waits(only(machine(gpu(error="fell off the bus")), trial(spec=SMALL)))

    @pytest.mark.parametrize("state", [RunState.INTENDED, RunState.RUNNING, RunState.STOPPING, RunState.UNKNOWN])
    def test_a_run_that_may_live_keeps_its_card(self, state: RunState) -> None:
        holder = trial(9, state=TrialState.RUNNING, runs=(run(RunKind.TRAIN, state, 0),))
        assert "taken by t9@1337" in waits(only(machine(gpu()), trial(spec=SMALL), holder))

    def test_a_run_that_is_over_does_not(self) -> None:
        holder = trial(
            9, state=TrialState.FINISHED, result=Result.STOPPED, runs=(run(RunKind.TRAIN, RunState.EXITED, 0),)
        )
        assert launched(only(machine(gpu()), trial(spec=SMALL), holder))

    def test_the_tightest_card_that_fits(self) -> None:
        cards = machine(gpu(0, total=16), gpu(1, total=12))
        assert launched(only(cards, trial(spec=SMALL))).gpu_uuids == ("GPU-1",)
        assert launched(only(cards, trial(spec={"resources": {"vram_gb": 13}}))).gpu_uuids == ("GPU-0",)

    def test_a_need_that_no_card_can_meet(self) -> None:
        reason = waits(only(machine(gpu(total=12)), trial(spec={"resources": {"vram_gb": 20}})))
        assert "the largest card here has 12.0 GB" in reason

    def test_commands_need_half_of_a_card(self) -> None:
        assert launched(only(machine(gpu(used=7)), command()))
        assert "8.0 + 0.5" in waits(only(machine(gpu(used=8)), command()))

    def test_trainers_need_what_their_shape_predicts(self) -> None:
        thin = {"model": {"model_dim": 128}, "batch": {"train_batch_tokens": 8192}}
        wide = {"model": {"model_dim": 1024}, "batch": {"train_batch_tokens": 65536}}
        half_full = machine(gpu(total=80, used=76))
        assert launched(only(half_full, trial(spec={"trainer": thin})))
        assert "4.0 GB free, needs " in waits(only(half_full, trial(spec={"trainer": wide})))

    def test_the_micro_batch_is_that_which_the_trainer_will_choose_on_the_card(self) -> None:
        asking = trial(spec={"trainer": {"preset": "recommended"}})
        settings = asking.spec.train_config(1337)
        for total in (16, 40, 141):
            micro = fitting_micro_tokens(settings, int(0.9 * total * GB))
            assert memory_need(asking)(gpu(total=total)) == peak_memory_bytes(settings, micro_tokens=micro)
        # A card where nothing fits is too small for the least micro-batch too.
        assert memory_need(asking)(gpu(total=2)) > 2 * GB
        assert "needs " in waits(only(machine(gpu(total=2)), asking))

    def test_a_micro_batch_that_is_given_and_the_number_of_processes_count(self) -> None:
        batch = {"micro_batch_tokens": 8192}
        asking = trial(spec={"trainer": {"batch": batch}, "resources": {"gpus": 2}})
        settings = asking.spec.train_config(1337)
        assert memory_need(asking)(gpu(total=141)) == peak_memory_bytes(settings, micro_tokens=8192, world_size=2)
        assert len(launched(only(machine(gpu(0), gpu(1)), asking)).gpu_uuids) == 2

    def test_several_gpus(self) -> None:
        four = command(resources={"gpus": 2, "vram_gb": 4})
        assert launched(only(machine(gpu(0), gpu(1), gpu(2)), four)).gpu_uuids == ("GPU-0", "GPU-1")
        assert "this machine has 1" in waits(only(machine(gpu(0)), four))
        assert "GPU 1" in waits(only(machine(gpu(0), gpu(1, used=15)), four))

    def test_cpu_slots_are_counted(self) -> None:
        holder = trial(9, state=TrialState.RUNNING, runs=(run(slots=1),))
        assert launched(only(NO_GPU, command(), holder)).cpu_slots == 1
        assert "1 of 2 are free" in waits(only(NO_GPU, command(resources={"cpus": 2}), holder))
        assert "lower resources.cpus to 2" in waits(only(NO_GPU, command(resources={"cpus": 3})))

    def test_priority_then_arrival(self) -> None:
        slots = Devices(gpus=(), cpu_slots=1)
        found = decided(slots, trial(1), trial(2, {"priority": 5}), trial(3, {"priority": 5}))
        assert [(type(action), action.trial_id) for action in found] == [(Launch, 2), (Wait, 3), (Wait, 1)]

    def test_a_blocked_one_is_passed_and_it_is_said(self) -> None:
        holder = trial(9, state=TrialState.RUNNING, runs=(run(slots=1),))
        big, little = passed(1, priority=9, resources={"cpus": 2}), command(2)
        found = {action.trial_id: action for action in decided(NO_GPU, big, little, holder)}
        assert isinstance(found[1], Wait)
        assert isinstance(found[2], Launch)
        assert "passes t1@1337" in found[2].reason

    def test_after(self) -> None:
        late = command(1, after=["t2", "t3"])
        assert "t3, which the ledger does not know" in waits(only(NO_GPU, late, done(2, 2.0, spec={"export": "never"})))
        two, three = done(2, 2.0, spec={"export": "never"}), trial(3, state=TrialState.PAUSED)
        assert "waits for t3 to finish" in waits(only(NO_GPU, late, two, three))
        failed = trial(3, state=TrialState.FINISHED, result=Result.FAILED_OOM)
        assert launched(only(NO_GPU, late, two, failed))


class TestReservation:
    """Two CPU slots, one of them taken: `big` wants both."""

    HOLDER = trial(9, state=TrialState.RUNNING, runs=(run(slots=1),))

    def verdicts(self, waited: float, little: TrialView | None = None) -> dict[int, Action]:
        big = dataclasses.replace(command(1, resources={"cpus": 2}), state_since=NOW - timedelta(seconds=waited))
        return {a.trial_id: a for a in decided(NO_GPU, big, little or command(2), self.HOLDER)}

    def test_a_trial_that_waited_long_enough_is_passed_no_more(self) -> None:
        assert isinstance(self.verdicts(3599)[2], Launch)
        found = self.verdicts(3600)
        assert "1 CPU slot(s) held for it, as it has waited for 1.0 h" in waits(found[1])
        assert "1 held for t1@1337" in waits(found[2])

    def test_higher_priority_still_goes_first(self) -> None:
        assert isinstance(self.verdicts(9999, command(2, priority=1))[2], Launch)

    def cards(self, *holders: TrialView, others: float = 0) -> dict[int, Action]:
        big, little = command(1, resources={"gpus": 2, "vram_gb": 4}), command(2, resources={"vram_gb": 4})
        cards = machine(gpu(0), gpu(1, used=others))
        return {a.trial_id: a for a in decided(cards, big, little, *holders)}

    def test_gpus_are_held_likewise(self) -> None:
        found = self.cards(trial(9, state=TrialState.RUNNING, runs=(run(RunKind.TRAIN, RunState.RUNNING, 1),)))
        assert "1 GPU(s) held for it" in waits(found[1])
        assert "held for t1@1337" in waits(found[2])

    def test_but_not_while_other_people_hold_the_rest(self) -> None:
        assert launched(self.cards(others=15)[2]).gpu_uuids == ("GPU-0",)


class TestHopeless:
    def wait(self, devices: Devices, *trials: TrialView) -> Wait:
        action = only(devices, *trials)
        assert isinstance(action, Wait)
        return action

    @pytest.mark.parametrize(
        ("devices", "view"),
        [
            (machine(gpu()), command(resources={"gpus": 2})),
            (machine(gpu(total=12)), trial(spec={"resources": {"vram_gb": 20}})),
            (NO_GPU, command(resources={"cpus": 3})),
            (NO_GPU, trial(spec={"resources": {"gpus": 1}})),
            (NO_GPU, command(after=["nobody"])),
        ],
    )
    def test_what_this_machine_can_never_start(self, devices: Devices, view: TrialView) -> None:
        assert self.wait(devices, view).hopeless

    @pytest.mark.parametrize(
        ("devices", "view"),
        [
            (machine(gpu(used=15)), trial(spec=SMALL)),
            (machine(gpu(error="fell off the bus")), trial(spec=SMALL)),
            (machine(gpu(total=12), gpu(1, total=80, error="sick")), trial(spec={"resources": {"vram_gb": 20}})),
            (Devices(gpus=None, cpu_slots=4, note="?"), trial(spec=SMALL)),
            (Devices(gpus=(), cpu_slots=1), command(after=["t3"])),
        ],
    )
    def test_what_may_come_free_or_back(self, devices: Devices, view: TrialView) -> None:
        assert not self.wait(devices, view, command(3)).hopeless

    def test_circles_are_named(self) -> None:
        one, two, three = command(1, after=["t2"]), command(2, after=["t3"]), command(3, after=["t1"])
        wait = self.wait(NO_GPU, two, one, three)
        assert wait.hopeless
        assert "waits for itself: t2 after t3 after t1 after t2" in wait.reason

    def test_hopelessness_spreads_along_after(self) -> None:
        last, middle, first = command(1, after=["t2"]), command(2, after=["t3"]), command(3, after=["nobody"])
        assert self.wait(NO_GPU, last, middle, first).hopeless
        paused = trial(3, state=TrialState.PAUSED)
        assert self.wait(NO_GPU, last, middle, paused).hopeless
        assert not self.wait(NO_GPU, last, middle, command(3)).hopeless

    def test_a_long_chain_is_no_circle(self) -> None:
        chain = [command(i, after=[f"t{i + 1}"]) for i in range(1, 1500)]
        assert not self.wait(NO_GPU, *chain, command(1500)).hopeless


class TestBudgetGate:
    def verdict(self, low: int, high: int) -> BudgetVerdict:
        return BudgetVerdict(budget_bytes=16_000_000, predicted_bytes=(low + high) // 2, low_bytes=low, high_bytes=high)

    def test_hopeless_shapes_never_start(self) -> None:
        (action,) = decided(NO_GPU, trial(), size=self.verdict(16_000_001, 18_000_001))
        assert isinstance(action, Finish)
        assert action.result is Result.REJECTED_OVER_BUDGET
        assert "17,000,001 bytes" in action.reason
        assert "at least 1 bytes" in action.reason

    def test_a_doubtful_one_may_try(self) -> None:
        assert isinstance(decided(NO_GPU, trial(), size=self.verdict(16_000_000, 18_000_000))[0], Launch)

    def test_commands_and_trials_that_have_run_are_not_weighed(self) -> None:
        heavy = self.verdict(17_000_000, 18_000_000)
        again = trial(runs=(run(state=RunState.LOST),))
        for view in (command(), again):
            assert isinstance(decided(NO_GPU, view, size=heavy)[0], Launch)

    def test_the_real_prediction(self) -> None:
        small = size_of(trial(spec={"trainer": {"model": {"model_dim": 128, "num_layers": 4}}}))
        large = size_of(trial(spec={"trainer": {"model": {"model_dim": 1024, "num_layers": 16}}}))
        assert small is not None
        assert large is not None
        assert small.fits
        assert large.hopeless
        assert size_of(command()) is None

"""The run loop of a machine: from RIP until something ends the run; its virtual time, and the budget of instructions.

:class:`~vmlab.machine.pc.Machine` wires the parts and is built on this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vmlab.errors import GuestError
from vmlab.ledger import Counts
from vmlab.machine.code import Block, Tags
from vmlab.machine.counter import Counter
from vmlab.machine.cpu import Cpu
from vmlab.machine.decode import Instruction
from vmlab.machine.engine import Engine
from vmlab.machine.exceptions import Interrupts
from vmlab.machine.protocols import GuestMode, InterruptSource, Monitor, Stop, StopReason
from vmlab.machine.timeline import Timeline

if TYPE_CHECKING:
    from vmlab.machine.blocks import Blocks
    from vmlab.machine.fast_events import FastEvents

#: Virtual time stamp counter: ticks per nanosecond of virtual time. One is as good as another; one is simple.
TSC_PER_NANOSECOND = 1
_VAIN_EVENTS = 100_000
_FOR_EVER = 1 << 62


class Running:
    """A machine as far as it runs. The parts named here are the machine's to make."""

    engine: Engine
    cpu: Cpu
    counter: Counter
    blocks: Blocks
    timeline: Timeline
    interrupts: Interrupts
    intr: InterruptSource
    events: Counts
    monitor: Monitor | None
    on_attention: Callable[[], bool]

    def __init__(self) -> None:
        #: A CPU that waits in HLT through so many due events, none of which wakes it, waits for ever.
        self.patience = _VAIN_EVENTS
        #: What C does about events, where it does; None: all of them are Python's.
        self.native_events: FastEvents | None = None
        #: What a guest-mode CPU (AMD-V) does about an instruction or interrupt before it happens; see svm.py.
        self.guest_mode: GuestMode | None = None
        #: Called with a new block's address; a translator answers with what its code stands for.
        self.tagger: Callable[[int, list[Instruction]], Tags | None] = lambda pc, instructions: None
        #: The time stamp counter's offset (a VMM may hide its own time; TSC_OFFSET of AMD-V).
        self.tsc_offset = self._tsc_adjustment = 0
        #: What the time stamp counter counts instead of virtual time; called with the address about to run (None: between two instructions).
        self.cycles: Callable[[int | None], int] | None = None
        self._failure: BaseException | None = None
        #: What ended the last run, or has been asked for since (a device that a monitor wrote to).
        self.ending: Stop | None = None
        #: The part of virtual time that was skipped in HLT, in nanoseconds.
        self.idle_time = 0
        #: The block that had just run when the last run ended between two blocks; None where it was left otherwise.
        self.left_off: Block | None = None
        self._budget = _FOR_EVER
        #: A device wrote to code: no block may run before it is decoded anew.
        self.stale_code = False
        self._running = self._interrupted = self._detoured = False
        self._asked_for: Stop | None = None     # during a detour
        self._broken_off = (-1, -1)

    # ---- how a run ends
    @property
    def failure(self) -> BaseException | None:
        """The error that ends the run."""
        return self._failure

    @failure.setter
    def failure(self, failure: BaseException | None) -> None:
        self._failure = failure
        self._note_end()

    @property
    def _stop(self) -> Stop | None:
        return self.ending

    @_stop.setter
    def _stop(self, stop: Stop | None) -> None:
        self.ending = stop
        self._note_end()

    def _note_end(self) -> None:
        if self.native_events is not None:
            self.native_events.note_end(self._failure is not None, self.ending is not None)

    # ---- running
    def run(self, budget: int | None = None) -> Stop:
        """Let the CPU go on from its RIP until something ends the run.

        :param budget: guest instructions, from the machine's start, that may not be exceeded.
        :raises GuestBudget: when the budget was spent.
        :raises TripleFault: when the CPU shut down.
        """
        if budget is not None:
            self.budget = budget
        self._stop = None
        stop = self._go_on()
        while stop is None:
            stop = self._go_on()
        self.left_off = self.counter.current
        self.counter.drop()
        return stop

    def _go_on(self) -> Stop | None:
        """Until the CPU stops once: why the run ends there, or None where it only waited in HLT."""
        if self.stale_code:  # flushed here, since translated code that runs may be chained to what goes
            self.engine.uc.ctl_flush_tb()
            self.stale_code = False
        self.cpu.load()
        if self.counter.current is None:  # else the next block's hook asks
            self.counter.set_cpl(self.cpu.cpl)
        self._running, self._interrupted = True, False
        error = self.engine.start(self.cpu.rip)
        self._running = False
        self.cpu.load()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if self._stop is None and not self.stale_code and not self._interrupted:
            if error:
                raise GuestError(f"the CPU could not go on at {self.cpu.rip:#x}: {self.engine.error_text(error)}")
            if self.blocks.ended_in_hlt():
                self._halted()
            elif self._broken_off == (self.cpu.rip, self.time):
                raise GuestError(f"the CPU could not go on at {self.cpu.rip:#x}: its code is taken away from it again and again")
            else:   # Unicorn ends a run without a word when the block that runs is thrown away (blocks.py: forget)
                self._broken_off = (self.cpu.rip, self.time)
        return self._stop

    @contextlib.contextmanager
    def detour(self) -> Iterator[Cpu]:
        """Run code of a monitor's in the middle of whatever goes on, its own handler included; then all is as before.

        Within the ``with`` statement the CPU's state is set up; at its end the CPU runs from there, with no monitor over
        it (exceptions and interrupts go through the IDT), until somebody stops the engine. Then the state of before is
        restored, but for memory, devices and what was counted. A run whose end was asked for meanwhile ends afterwards.
        """
        cpu, counter, inside = self.cpu, self.counter, self._running
        cpu.store()
        saved = self.engine.uc.context_save()
        before, self._stop = self._stop, None
        block, cpl = counter.current, counter.cpl                           # whoever asked has not done with them
        counter.current = None
        kept = self.monitor, self.guest_mode, self.on_attention, self.tagger
        self.monitor = self.guest_mode = None
        self.on_attention = lambda: False
        self.tagger = lambda pc, instructions: [None] * len(instructions)   # none of these is the guest's
        try:
            yield cpu
            cpu.store()
            counter.set_cpl(cpu.cpl)
            self._detoured = True
            error = self.engine.start(cpu.rip)
            self._detoured = False
            if error:
                cpu.load()
                raise GuestError(f"the monitor's code could not go on at {cpu.rip:#x}: {self.engine.error_text(error)}")
        finally:
            self.monitor, self.guest_mode, self.on_attention, self.tagger = kept
            self.interrupts.update()
            self._stop, self._asked_for = self._asked_for or before, None
            self.engine.uc.context_restore(saved)
            self.engine.flush_tlb()
            cpu.load()
            counter.drop(0)
            counter.current = block
            counter.set_cpl(cpl)
            if inside:      # Unicorn may or may not end the outer run with the inner one: let it end, and go on from there
                self._interrupted = True
                self.engine.stop()
        if self.failure is not None:
            raise self.failure

    def stop(self, stop: Stop) -> None:
        """End the run at the next instruction boundary the CPU reaches (for monitors and devices); a monitor's detour comes to its end first."""
        if self._detoured:
            self._asked_for = stop
            return
        self._stop = stop
        self.engine.stop()

    def fail(self, failure: BaseException) -> None:
        """End the run with an error: nothing may leave a callback any other way."""
        if self.failure is None:
            self.failure = failure
        self.engine.stop()

    def guest_exit(self, code: int) -> None:
        """The guest wrote to the debug-exit port."""
        self.stop(Stop(StopReason.EXIT, code))

    def reset(self) -> None:
        """A device pulled the CPU's reset input: the run ends."""
        self.stop(Stop(StopReason.RESET))

    # ---- time
    @property
    def time(self) -> int:
        """Virtual time in nanoseconds: guest instructions executed, by whatever means, plus the time skipped in HLT."""
        return self.counter.time

    @property
    def budget(self) -> int:
        """Guest instructions, from the machine's start, that may not be exceeded."""
        return self._budget

    @budget.setter
    def budget(self, instructions: int) -> None:
        self._budget = min(instructions, _FOR_EVER)
        self._set_limit()

    @property
    def last_moment(self) -> int:
        """The time at which the budget is spent."""
        return self._budget + self.idle_time

    def _set_limit(self) -> None:
        """Have the counter ask before the budget is spent or something is due, whichever comes first."""
        due = self.timeline.next_due
        self.counter.limit = self.last_moment if due is None else min(due, self.last_moment)

    def read_tsc(self, address: int | None = None) -> int:
        """The time stamp counter: virtual time (with the instruction at ``address`` about to run), and the offset."""
        if self.cycles is not None:
            return (self.cycles(address) + self.tsc_adjustment + self.tsc_offset) & 0xFFFFFFFFFFFFFFFF
        time = self.counter.time
        block = self.counter.current
        if address is not None and block is not None:
            index = block.offsets.get(address - block.pc)
            if index is not None:
                time -= block.guest_weight_from(index)
        return (time * TSC_PER_NANOSECOND + self.tsc_adjustment + self.tsc_offset) & 0xFFFFFFFFFFFFFFFF

    @property
    def tsc_adjustment(self) -> int:
        """What WRMSR made of the time stamp counter, against virtual time."""
        return self._tsc_adjustment

    @tsc_adjustment.setter
    def tsc_adjustment(self, value: int) -> None:
        self._tsc_adjustment = value
        if self.native_events is not None:
            self.native_events.note_time_stamp(value)

    def set_tsc(self, value: int, address: int) -> None:
        """The WRMSR at ``address`` sets the time stamp counter."""
        self.tsc_adjustment += value - self.read_tsc(address)

    def idle(self) -> None:
        """The guest waits in HLT (a monitor calls this when it halts on its guest's behalf)."""
        self.events["idle"] += 1

    def wait(self) -> bool:
        """The CPU waits for INTR: time skips from one due event to the next. False when INTR will never come."""
        for _ in range(self.patience):
            if self.intr.pending or self.interrupts.nmi_ready:
                return True
            due = self.timeline.next_due
            if due is None:
                return False
            skipped = max(due - self.counter.time, 0)
            self.counter.time += skipped
            self.idle_time += skipped
            self.timeline.run_due()
            if self._stop is not None:
                return False
        return False

    def _halted(self) -> None:
        """HLT was executed at CPL 0: wait for an interrupt, or for ever."""
        self.idle()
        if self.interrupts.nmi_ready or (self.interrupts.recognised and self.wait()):
            (self.interrupts.take_nmi if self.interrupts.nmi_ready else self.interrupts.take)()
            self.cpu.store()
        elif self._stop is None:
            self._stop = Stop(StopReason.HALTED)

    def drop_translations(self) -> None:
        """Code was written by a device, or is out of reach: the CPU must decode all anew, and can, once it has stopped."""
        self.stale_code = True
        self.engine.stop()

"""The one place where the parts are wired: `instrument()` and the `Session` that it returns."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from torchprobe.arguments import check_count, check_number, check_timeout
from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import Drain
from torchprobe.buffer.outlet import Outlet
from torchprobe.buffer.step import TransferBuffers
from torchprobe.capture.gate import Gate, Meter
from torchprobe.capture.modules import Patterns, Selection, checked_model
from torchprobe.capture.pipelining import stages_of
from torchprobe.capture.sources import Sources
from torchprobe.control import ControlFile, SamplingCalls
from torchprobe.description import described, state_lines
from torchprobe.distributed import open_exchange
from torchprobe.distributed.world import world
from torchprobe.flight import STATE_TAG, FlightRecorder, last_error, state_after, state_at_exit
from torchprobe.logs import Logs
from torchprobe.messages import log as _log
from torchprobe.naming import all_parameters, unwrapped, without_ranks
from torchprobe.probes.base import Probe
from torchprobe.probes.choosing import checked_probes, with_provenance
from torchprobe.probes.schedule import Schedule
from torchprobe.records import Text
from torchprobe.reports.notebook import Shown, Summary, make_room
from torchprobe.rules.alert import Alert
from torchprobe.rules.choosing import Rule
from torchprobe.rules.watch import Watch, open_watch
from torchprobe.state import RunState
from torchprobe.steps.cadence import Plan
from torchprobe.steps.recorder import Recorder
from torchprobe.writers.hparams import HParamsWriter, checked_hparams
from torchprobe.writers.protocol import NoWriter
from torchprobe.writers.run_directory import RunDirectory, open_writer

_SLOTS_A_PARAMETER = 512  # two histograms and some sums, twice over
_LEAST_SLOTS = 2**18
_KEEP = "keep what instrument() is given in a variable, as in `nets = nn.ModuleList([a, b]); instrument(nets)`"

_sessions: WeakIdKeyDictionary = WeakIdKeyDictionary()


def instrument(
    model: nn.Module,
    *,
    log_dir: str | os.PathLike[str] | None = None,
    run_name: str | None = None,
    writer: Any = None,
    probes: Iterable[Probe] | None = None,
    every: int | Schedule | None = None,
    flush_every: int = 100,
    flush_seconds: float = 30.0,
    include: Patterns = None,
    exclude: Patterns = None,
    hparams: Mapping[str, Any] | None = None,
    rules: Iterable[str | Rule] | None = None,
    on_alert: Callable[[Alert], object] | None = None,
    stop_on: Iterable[str] | bool | None = None,
    overhead_budget: float | None = None,
    overwrite: bool = False,
) -> Session:
    """Watch a model while it trains. The only line that a training script needs.

    The step clock comes from the optimizers that hold the model's parameters, made before or after this
    call; without one, forward passes are counted. Nothing in the training loop changes, and weights and
    random state are bitwise those of a run without this call.

    Args:
        model: the model, bare or wrapped (`torch.compile`, DDP, FSDP, checkpointing).
        log_dir: the run's directory, or a URL such as `s3://bucket/run`; by default a new one under `runs`. When
            another run is there at the first write, this one goes into `run_2`, `run_3`, ... in it and says so, unless
            a state was loaded: then the run of that state goes on. `session.log_dir` says where it is.
        run_name: a sub-folder of `log_dir` for this run.
        writer: instead of a directory: the user's own `SummaryWriter`, or any `torchprobe.Writer`.
        probes: what to watch, such as `[torchprobe.Gradients(every=10)]`; by default everything.
        every: one cadence for all sampled probes that name none: N is step 1, N, 2N, ...
        flush_every: steps between writes; flush_seconds: and the longest time between them.
        include, exclude: module-name patterns with `*`.
        hparams: hyperparameters for TensorBoard's HParams page, such as `{"lr": 1e-3}`; final metrics join them.
        rules: what to raise alerts about: names, rule objects, or functions `record -> alerts that hold in it`;
            by default all of `docs/alerts.md`, and [] for none.
        on_alert: called with each alert in a background thread, such as `torchprobe.WebhookNotifier(url)`.
        stop_on: names of rules whose alert ends the run with a `TrainingAlert` out of `optimizer.step()`; True: all.
        overhead_budget: the largest fraction of wall time that sampling may take, such as 0.01.
        overwrite: write into `log_dir` whatever is there. No file is removed; TensorBoard hides the earlier steps.

    Raises:
        TypeError, ValueError: for an argument that does not fit; the message names it and the fix.
        OSError: when `log_dir` cannot be written. ImportError: when it needs a package, which the message names.
    """
    make_room(session_of(model) if isinstance(model, nn.Module) else None)
    root = checked_model(model, _sessions)
    check_count("flush_every", flush_every)
    check_number("flush_seconds", flush_seconds, "a number of seconds above 0", lambda seconds: seconds > 0)
    if overhead_budget is not None:
        takes = "a fraction of wall time between 0 and 1, such as 0.01"
        check_number("overhead_budget", overhead_budget, takes, lambda fraction: 0 < fraction <= 1)
    watch, meter = open_watch(rules, on_alert, stop_on), Meter()
    parts = checked_probes(probes)
    parts = with_provenance(parts) if watch.traces_nan else parts
    plan = Plan(parts, every, overhead_budget, meter)
    selection = Selection(root, include, exclude)
    selection.check(root, parts)
    known = None if hparams is None else checked_hparams(hparams)
    ranks, place = world(), (writer, log_dir, run_name, type(root).__name__)
    run, opened = open_writer(*place, overwrite=overwrite) if ranks.writes else (None, NoWriter())
    sink = HParamsWriter(opened, known)
    origins = Gate("NonFinite", meter) if watch.traces_nan else None  # of NaN and inf
    sources = Sources(weakref.ref(root), plan.reporters, selection, meter, origins)
    decoder = Decoder(plan.descriptions, asked_for=probes is not None)
    exchange = open_exchange(ranks, plan.over_ranks, decoder, partial(stages_of, weakref.ref(root)))
    if exchange.stopping is not None and watch.may_stop:
        watch.stop_together(exchange.stopping.propose, exchange.stopping.reached)
        exchange.stopping.hold = watch.hold
    drain = Drain(sink, exchange.read, flush_seconds, watch, exchange)
    lanes = TransferBuffers(max(_LEAST_SLOTS, _SLOTS_A_PARAMETER * len(all_parameters(root))))
    outlet = Outlet(lanes, drain, decoder, flush_every)
    recorder = Recorder(without_ranks(model), plan, sources, outlet, meter, watch, ranks.size)
    state = RunState({"clock": recorder.clock, "plan": plan, "losses": outlet, "alerts": watch})
    if run is not None:
        watch.announce(described(root, known, ranks.size))
        watch.add_follower(FlightRecorder(run.folder("flight"), sources.snapshots.latest))
        watch.add_follower(ControlFile(lambda: run.path, plan, alone=ranks.size == 1))
        state.parts["run"] = run
    return Session(root, recorder, outlet, run, sink, watch, state, plan)


def session_of(model: nn.Module) -> Session | None:
    """The living session of a model, bare or wrapped; None when it has none."""
    session: Session | None = _sessions.get(unwrapped(model))
    return session


class Session(Logs, SamplingCalls, Shown):
    """A running instrumentation, made by `instrument`. A context manager: leaving it detaches."""

    def __init__(
        self,
        root: nn.Module,
        recorder: Recorder,
        outlet: Outlet,
        run: RunDirectory | None,
        sink: HParamsWriter,
        watch: Watch,
        state: RunState,
        plan: Plan,
    ) -> None:
        Logs.__init__(self, recorder, sink, run)
        SamplingCalls.__init__(self, plan)
        self._watch = watch
        self._outlet = outlet
        self._state = state
        self._model = weakref.ref(root)
        self._outcome = state_after(None)
        _sessions[root] = self
        self._finalizer = weakref.finalize(root, self._at_exit)  # when the model is collected, and at the end

    @property
    def step(self) -> int:
        """Completed steps: optimizer steps, or forward passes while no optimizer is in sight."""
        return self._recorder.clock.completed

    @property
    def alerts(self) -> list[Alert]:
        """What the rules said so far, in order, begins and ends of conditions: a new list.

        Rules see a step when it is written (see `flush_every`); after `flush()`, every step up to the last one.
        """
        return list(self._watch.alerts)

    @property
    def remarks(self) -> list[Alert]:
        """What diagnoses found that may be meant as it is, and is no alert, in order: a new list."""
        return list(self._watch.remarks)

    @property
    def attached(self) -> bool:
        """Whether the session still watches its model."""
        return self._finalizer.alive

    def next_step(self) -> None:
        """End a step by hand. From the first call on, nothing else does.

        A first call right after an optimizer's step ends nothing further: that step has just ended.
        """
        self._recorder.next_step()

    def flush(self, timeout: float | None = None) -> bool:
        """Write everything up to the last completed step. True when it is on disk.

        Waits up to `timeout` seconds, or as long as it takes; False when time ran out or writing failed.
        """
        check_timeout(timeout)
        if os.getpid() != self._recorder.guard.pid or not self.attached:
            return False
        self._recorder.flush()
        return self._outlet.drain.flush(timeout)

    def state_dict(self, timeout: float | None = 10.0) -> dict[str, Any]:
        """What a resumed run needs to go on here: put it into the checkpoint. `weights_only=True` loads it.

        Flushes first, waiting up to `timeout` seconds: the resumed run does not record again what is on disk.
        """
        if not self.flush(timeout) and self.attached:
            _log.warning("step %d goes into a checkpoint, and not all steps before it are written yet", self.step)
        return self._state.state_dict(self._root())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another session of this model stood. Before the first step, with the same `log_dir`.

        TensorBoard then shows one curve: what the other session wrote beyond that step is hidden.

        Raises:
            RuntimeError: after a step or a forward pass, or when the session is detached.
            TypeError, ValueError: for what is no session's state, or one of another model.
        """
        if not self._recorder.clock.untouched or not self.attached:
            when = f"after step {self.step}" if self.attached else "the session is detached, or its model is gone"
            raise RuntimeError(f"load_state_dict comes too late, {when}: call it right after torchprobe.instrument")
        self._state.load_state_dict(state, self._root())
        self._recorder.resume()
        self._sink.restart(self.step + 1)

    def paused(self) -> AbstractContextManager[None]:
        """Nothing is recorded or counted inside, such as a step that an optimizer takes to make its state."""
        return self._recorder.guard.paused()

    def detach(self, timeout: float | None = None) -> bool:
        """Take off every hook, write what is left, end the thread. A second call waits for what the first left.

        Waits up to `timeout` seconds for the writing, or as long as it takes; False when something was left unwritten.
        """
        check_timeout(timeout)
        if self._finalizer.detach() is not None:
            return self._finish(timeout)
        return os.getpid() != self._recorder.guard.pid or self._outlet.drain.close(timeout)

    def summary(self) -> Summary:
        """A few lines for a person, a table in a notebook: steps, where the run is, what was lost or never seen."""
        place = self.log_dir or "the writer that was handed over"
        first = f"torchprobe: {self.step} steps, {'attached' if self.attached else 'detached'}"
        lines = [first, f"  run directory     {place}", *state_lines(self._recorder, self._outlet, self._watch)]
        return Summary("\n".join(lines))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._leave(error, state_after(error))
        self.detach()

    def __repr__(self) -> str:
        return f"<torchprobe.Session step={self.step} {'attached' if self.attached else 'detached'}>"

    def _root(self) -> nn.Module:
        root = self._model()
        if root is None:
            raise RuntimeError("the model of this session is gone")
        return root

    def _leave(self, error: BaseException | None, outcome: Text) -> None:
        self._sink.failed = error is not None and outcome != state_after(None)
        self._watch.crashed(error)
        self._outcome = outcome

    def _at_exit(self) -> None:
        if self._model() is None and self._recorder.clock.untouched:  # such as a list that nothing else holds
            _log.warning("the model was deleted before it was trained, of which nothing is recorded: %s", _KEEP)
        error = last_error()
        self._leave(error, state_at_exit(error, self._model()))
        self._finish(timeout=30.0)

    def _finish(self, timeout: float | None) -> bool:
        root = self._model()
        if root is not None:
            _sessions.pop(root, None)
        forked = os.getpid() != self._recorder.guard.pid  # a child has no drain thread, and not its own file
        if not forked:
            if self._run is not None and not self._recorder.clock.untouched:
                self._recorder.log(STATE_TAG, self._outcome)
            self._recorder.close()
        self._recorder.detach()
        return forked or self._outlet.drain.close(timeout)

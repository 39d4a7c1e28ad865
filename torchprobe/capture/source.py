"""What fetches values from the user's program: the protocol of a source, and the forward pass that values belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import get_ident
from typing import Any, Protocol, TypeAlias
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchprobe.buffer.step import Piece
from torchprobe.capture.compiled.tracing import unseen
from torchprobe.capture.gate import Meter
from torchprobe.capture.in_place import InPlace
from torchprobe.probes.base import Reporter
from torchprobe.probes.checks import register

TRAINING, UNDECIDED, VALIDATION, DROPPED = "training", "undecided", "validation", "dropped"
"""What a pass is. `UNDECIDED`: with gradients, in evaluation mode; training once a backward pass runs through it."""


class Dropped:
    """Passes whose graphs are gone without a backward pass: told by the garbage collector, on any thread."""

    def __init__(self) -> None:
        self._passes: list[tuple[str, dict[Any, Any], Any]] = []
        self.any = False
        """Whether there are some, for those who ask at every step."""

    def add(self, kind: str, kept: dict[Any, Any], sign: Any) -> None:
        """One more. Takes no lock and runs nothing: a garbage collection may call it anywhere."""
        self._passes.append((kind, kept, sign))
        self.any = True

    def take(self) -> list[tuple[str, dict[Any, Any], Any]]:
        """Those since the last call."""
        self.any = False
        passes, self._passes = self._passes, []
        return passes


class BackwardObserver(Protocol):
    """Hears of backward passes."""

    def heard_backward(self, passing: Pass) -> int | None:
        """A gradient reaches an output of a forward pass. The number of the backward pass, where it is a new one."""


class Pass:
    """A forward pass of the model, and what sources keep of it until it is known whether it counts.

    It is the hook on the pass's outputs, so that it lives as long as their graph does, and holds nothing of it.

    due: whose rows the pass gives. kept: by source. sign: of NaN in its output. task: the backward pass that runs
    through it. beside: it is that of a part, which is heard of in some steps only.
    """

    __slots__ = (
        *("__weakref__", "_dropped", "_handles", "_observer", "before", "beside"),
        *("due", "kept", "kind", "sign", "task"),
    )
    __torch_unserializable__ = True  # a user who pickles an output is not warned of a hook that he did not make

    def __init__(
        self, kind: str, due: frozenset[Reporter], observer: Callable[[], BackwardObserver | None], dropped: Dropped
    ) -> None:
        self.kind = kind
        self.due = due
        self.kept: dict[Any, Any] = {}
        self.sign: Any = None
        self.task: int | None = None
        self.before: tuple[Pass, ...] = ()
        self.beside = False
        self._handles: list[RemovableHandle] = []
        self._observer = observer  # a weak reference
        self._dropped = dropped

    @property
    def training(self) -> bool:
        """Whether sources take it as one of training, as far as is known."""
        return self.kind is TRAINING or self.kind is UNDECIDED

    @unseen
    def __call__(self, gradient: Tensor) -> None:
        """A gradient reaches one of its outputs."""
        observer = self._observer()
        task = None if observer is None else observer.heard_backward(self)
        if task is not None:
            self.task = task

    def __del__(self) -> None:
        told = self.kind is not DROPPED and (self.sign is not None or (self.kept and self.kind is UNDECIDED))
        if self.task is None and told:
            self._dropped.add(self.kind, self.kept, self.sign)
        if self._handles:
            self.release()

    def decide(self, kind: str) -> None:
        """It is known what the pass is."""
        self.kind = kind

    def stand_beside(self) -> Pass:
        """It is that of a part."""
        self.beside = True
        return self

    def follow(self, unheard: list[Pass]) -> None:
        """Those of parts that need no gradient came before it in a loop: what becomes of it becomes of them."""
        self.before = tuple(unheard)
        for one in unheard:
            one.decide(DROPPED)  # by itself: its numbers are told of once
        unheard.clear()

    def saw(self, sign: Any) -> None:
        """Its output was looked at."""
        self.sign = sign

    def keep(self, source: Any, kept: Any) -> None:
        """What a source has of the pass."""
        self.kept[source] = kept

    def take(self) -> dict[Any, Any]:
        """What was kept of it; what comes later is kept anew."""
        kept, self.kept = self.kept, {}
        return kept

    def hold(self, handle: RemovableHandle) -> None:
        """A hook that must not outlive the pass, such as one on a parameter."""
        self._handles.append(handle)

    def release(self) -> None:
        """Take such hooks off."""
        while self._handles:
            self._handles.pop().remove()


class Undecided:
    """Passes of which it is not known yet what they are; none of them is kept alive."""

    def __init__(self) -> None:
        self.passes: list[tuple[ReferenceType[Pass], int]] = []

    def add(self, passing: Pass, weights: int) -> None:
        """One more. weights: the step whose weights it had."""
        self.passes.append((ref(passing), weights))

    def take(self, sparing: int | None) -> Iterator[tuple[Pass, int]]:
        """Those that are validation now, and the weights that they had. sparing: not those of this step's weights."""
        passes, self.passes = self.passes, [one for one in self.passes if one[1] == sparing]
        for weak, weights in passes:
            passing = weak()
            if passing is not None and passing.kind is UNDECIDED and passing.task is None and weights != sparing:
                passing.decide(VALIDATION)
                yield passing, weights


def uncounted() -> Pass:
    """A pass that is none of the user's: nothing of it is kept."""
    return Pass(DROPPED, frozenset(), lambda: None, Dropped())


class Running:
    """What is under way in the thread that trains: shared by the recorder, which tells, and all hooks, which ask.

    meter: of all that hooks take.
    """

    def __init__(self, meter: Meter, in_place: InPlace) -> None:
        self.meter = meter
        self.in_place = in_place
        self.passing: Pass | None = None
        self.compiled = False  # a hook was traced: hooks stay on, and only flags change
        self.fired = False  # a hook ran outside of graphs in this step
        self.training = True  # what the pass that a graph was called for is
        self.sampled = False  # a probe of passes is due in training: the one flag that tells two graphs apart
        self.sampled_val = False  # and in validation
        self._thread = 0
        self._in_backward: Callable[[], Pass | None] = lambda: None
        self._in_graph: Callable[[bool], Pass | None] = lambda training: None
        self._in_call: Callable[[nn.Module | None, Tensor], Pass | None] = lambda module, output: None

    def ask(
        self,
        in_backward: Callable[[], Pass | None],
        in_graph: Callable[[bool], Pass | None],
        in_call: Callable[[nn.Module | None, Tensor], Pass | None],
    ) -> None:
        """Where values belong that come in a backward pass, and outside of passes: from a graph, from a module."""
        self._in_backward, self._in_graph, self._in_call = in_backward, in_graph, in_call

    def enter(self, passing: Pass) -> None:
        """A forward pass begins."""
        self.passing, self.training, self._thread = passing, passing.kind is not VALIDATION, get_ident()

    @property
    def thread(self) -> int:
        """That of the last forward pass."""
        return self._thread

    @property
    def in_parts(self) -> bool:
        """Whether graphs run, and no pass of the whole model was heard of."""
        return self.compiled and not self._thread

    def leave(self) -> Pass | None:
        """The forward pass of this thread is over: which it was."""
        passing = self.passing
        if passing is None or self._thread != get_ident():
            return None
        self.passing = None
        return passing

    def enter_graph(self, training: bool) -> None:
        """A graph of the model runs, which this is part of."""
        self.compiled = True
        self.training = training

    def follow(self, sampled: bool, sampled_val: bool) -> None:
        """What graphs are to record from now on."""
        self.sampled, self.sampled_val = sampled, sampled_val

    def note_fired(self) -> None:
        """A hook of a module ran."""
        self.fired = True

    def forget_fired(self) -> None:
        """A step is over."""
        self.fired = False

    def forward(self) -> Pass | None:
        """The forward pass that runs in this thread."""
        return self.passing if self._thread == get_ident() else None

    def of_backward(self) -> Pass | None:
        """The forward pass that the running backward pass runs through."""
        return self._in_backward()

    def of_call(self, module: nn.Module | None, output: Tensor) -> Pass | None:
        """The pass that a module in training mode runs for, or one of its own. module: None where no hook may stay."""
        return self.forward() or (self._in_call(module, output) if self.passing is None else None)

    def of_graph(self, training: bool) -> Pass | None:
        """The pass that a compiled graph runs for."""
        return self.passing or self._in_graph(training)


class Source(Protocol):
    """Fetches values of one kind. What it keeps of a pass it hands to `Pass.keep`; the recorder decides what counts.

    An exception in it must end at the gate of the reporter whose value it fetches: see `capture.gate`.
    """

    def open(self, step: int) -> None:
        """A step begins."""

    def enter(self, passing: Pass, module: nn.Module) -> None:
        """A forward pass begins, of the model or of a part that is called by itself."""

    def leave(self, passing: Pass, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """It has returned; not called for one that raised."""

    def exit(self, passing: Pass) -> None:
        """It has ended, by an exception or not: nothing stays entered."""

    def merge(self, a: Any, b: Any) -> Any:
        """What two passes kept, together, so that memory is bounded over many micro-batches."""

    def rows(self, kept: Any, training: bool, due: frozenset[Reporter]) -> Sequence[Piece]:
        """What passes kept, as rows for the buffer."""

    def detach(self) -> None:
        """Take everything off the user's program."""


MakeSource: TypeAlias = "Callable[[ReferenceType[nn.Module], Sequence[Reporter]], Source]"

_makers: dict[str, MakeSource] = {}  # process-wide, as classes are


def register_source(name: str, make: MakeSource) -> None:
    """Let probes name a source of one's own: `source = "<name>"`.

    make: called at `instrument()` with a weak reference to the model and the reporters of the probes that name it.
    Raises TypeError for what cannot be called, ValueError for a name that is taken.
    """
    if not callable(make):
        raise TypeError(f"make={make!r}: takes a class or function of (model, reporters) that returns a Source")
    register(name)
    _makers[name] = make


def registered(reporters: Sequence[Reporter]) -> Iterator[tuple[MakeSource, list[Reporter]]]:
    """The sources of users' own that these probes name, each with its reporters."""
    for name, make in _makers.items():
        mine = [reporter for reporter in reporters if reporter.source == name]
        if mine:
            yield make, mine

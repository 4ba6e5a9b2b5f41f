from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmc.store.extents import Extents

N = 40


class ExtentsMachine(RuleBasedStateMachine):
    """Extents against a set of free units."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(N)
        self.free = set(range(N))
        self.taken: list[list[tuple[int, int]]] = []

    @rule(k=st.integers(1, N))
    def take(self, k: int) -> None:
        longest = max(map(len, self.runs()), default=0)
        runs = self.extents.take(k)
        if k > len(self.free):
            assert runs is None
            return
        assert runs is not None
        units = [unit for start, end in runs for unit in range(start, end)]
        assert len(units) == len(set(units)) == k and set(units) <= self.free
        assert len(runs) == 1 or k > longest  # in pieces only where no run is long enough
        self.free -= set(units)
        self.taken.append(runs)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        runs = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.extents.give(runs)
        self.free |= {unit for start, end in runs for unit in range(start, end)}

    @invariant()
    def counts_and_merges(self) -> None:
        assert self.extents.free == len(self.free)
        starts = self.extents._starts
        assert [list(range(s, self.extents._ends[s])) for s in starts] == self.runs()

    def runs(self) -> list[list[int]]:
        runs: list[list[int]] = []
        for unit in sorted(self.free):
            if runs and runs[-1][-1] == unit - 1:
                runs[-1].append(unit)
            else:
                runs.append([unit])
        return runs


TestExtents = ExtentsMachine.TestCase


@given(st.lists(st.integers(1, 7), max_size=20))
def test_all_given_back_is_one_run(sizes: list[int]) -> None:
    extents = Extents(200)
    taken = [extents.take(k) for k in sizes]
    for runs in taken[::2] + taken[1::2]:
        assert runs is not None
        extents.give(runs)
    assert extents.take(200) == [(0, 200)]

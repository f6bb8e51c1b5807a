"""Random sequences of apply, revert and nested contexts restore every weight bit for bit."""

import random

import pytest
import torch

import overpaint
from overpaint.edit import Change, Movement
from overpaint.edit.weights import find_weight, fingerprint
from overpaint.zoo import builders

OUT, Q, V, K = (f"text.0.self_attn.{name}_proj" for name in ("out", "q", "v", "k"))


@pytest.fixture(scope="module")
def small():
    """A model with one text layer, in which weights are found quickly."""
    return overpaint.load(builders.tiny(text_layers=1))


def change(model, sites, seed):
    """Return a change of several weights, made for their present values."""
    generator = torch.Generator().manual_seed(seed)
    movements = []
    for site in sites:
        weight = find_weight(model, site).parameter
        left, right = (torch.randn(64, 2, generator=generator) for _ in range(2))
        none = torch.zeros(0, 64), torch.zeros(0, 64)
        base = fingerprint(weight)
        movements.append(Movement(site, base, left, right.T.contiguous(), *none, (), None))
    return Change(tuple(movements), {}, {})


class Ledger:
    """The expected state of each weight: the names of the changes applied to it, oldest first."""

    def __init__(self, model, changes, needs):
        self.model, self.changes, self.needs = model, changes, needs
        self.applied = {site: [] for c in changes.values() for site in c.sites}

    def step(self, rng, depth):
        name = rng.choice(sorted(self.changes))
        action = rng.choice(["apply", "revert", "block"] if depth < 2 else ["apply", "revert"])
        sites = self.changes[name].sites
        if action == "revert":
            allowed = all(self.applied[s][-1:] == [name] for s in sites)
            self.attempt(allowed, self.changes[name].revert)
            if allowed:
                for site in sites:
                    self.applied[site].pop()
            return
        allowed = all(self.applied[s] == self.needs[name].get(s, []) for s in sites)
        if action == "apply":
            self.attempt(allowed, self.changes[name].apply)
            if allowed:
                self.push(name)
        else:
            self.block(rng, name, allowed, depth)

    def block(self, rng, name, allowed, depth):
        if not allowed:
            return self.attempt(False, lambda model: self.changes[name].applied(model).__enter__())
        below = {site: list(self.applied[site]) for site in self.changes[name].sites}
        error = rng.choice([None, RuntimeError, KeyboardInterrupt])
        try:
            with self.changes[name].applied(self.model):
                self.push(name)
                for _ in range(rng.randrange(4)):
                    self.step(rng, depth + 1)
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            assert error
        self.close(below)
        return None

    def close(self, below):
        """Leave a block: its weights are restored, and later changes are removed from all their weights."""
        removed = {n for site, names in below.items() for n in self.applied[site][len(names) :]}
        self.applied |= below
        for site, names in self.applied.items():
            if site not in below:
                self.applied[site] = [n for n in names if n not in removed]

    def push(self, name):
        for site in self.changes[name].sites:
            self.applied[site].append(name)

    def attempt(self, allowed, action):
        if allowed:
            action(self.model)
            return
        with pytest.raises(ValueError, match="wrong base hash|nothing to revert|another change"):
            action(self.model)

    def check(self, seen):
        """Check that the value of a weight depends only on the changes applied to it."""
        for site, names in self.applied.items():
            value = fingerprint(find_weight(self.model, site).parameter)
            assert seen.setdefault((site, *names), value) == value
        for name, change in self.changes.items():
            last = all(self.applied[s][-1:] == [name] for s in change.sites)
            assert change.is_applied(self.model) == last

    def unwind(self):
        while any(self.applied.values()):
            for name, change in self.changes.items():
                if all(self.applied[s][-1:] == [name] for s in change.sites):
                    change.revert(self.model)
                    for site in change.sites:
                        self.applied[site].pop()


@pytest.mark.parametrize(
    ("dtype", "sequences"), [(torch.float32, 400), (torch.float16, 300), (torch.bfloat16, 300)]
)
def test_random_sequences_restore_every_weight(small, dtype, sequences):
    small.text_encoder.to(dtype)
    first, second = change(small, [OUT], 1), change(small, [Q, V], 2)
    with first.applied(small):
        third = change(
            small, [OUT, K, V], 3
        )  # requires the first, shares no record with the second
    changes = {"first": first, "second": second, "third": third}
    needs = {"first": {}, "second": {}, "third": {OUT: ["first"]}}
    before = {n: fingerprint(p) for n, p in small.text_encoder.named_parameters()}
    seen = {}
    for seed in range(sequences):
        rng, ledger = random.Random(seed), Ledger(small, changes, needs)
        for _ in range(rng.randrange(1, 7)):
            ledger.step(rng, 0)
        ledger.check(seen)
        ledger.unwind()
        ledger.check(seen)
    assert {n: fingerprint(p) for n, p in small.text_encoder.named_parameters()} == before
    assert len(seen) >= 9  # the sequences reached the combinations

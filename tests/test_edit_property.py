"""A thousand random sequences of apply, revert and blocks end where they began, to the bit."""

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
    """A model of one text layer, whose weights are quickly looked up."""
    return overpaint.load(builders.tiny(text_layers=1))


def change(model, sites, seed):
    """A change of several weights, made for what they hold now."""
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
    """What each weight should hold: the names of the changes applied to it, oldest first."""

    def __init__(self, model, changes, needs):
        self.model, self.changes, self.needs = model, changes, needs
        self.applied = {site: [] for c in changes.values() for site in c.sites}

    def step(self, rng, depth):
        name = rng.choice(sorted(self.changes))
        deed = rng.choice(["apply", "revert", "block"] if depth < 2 else ["apply", "revert"])
        sites = self.changes[name].sites
        if deed == "revert":
            allowed = all(self.applied[s][-1:] == [name] for s in sites)
            self.attempt(allowed, self.changes[name].revert)
            if allowed:
                for site in sites:
                    self.applied[site].pop()
            return
        allowed = all(self.applied[s] == self.needs[name].get(s, []) for s in sites)
        if deed == "apply":
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
        """Leave a block: its weights return, and what stood on them goes from everywhere."""
        gone = {n for site, names in below.items() for n in self.applied[site][len(names) :]}
        self.applied |= below
        for site, names in self.applied.items():
            if site not in below:
                self.applied[site] = [n for n in names if n not in gone]

    def push(self, name):
        for site in self.changes[name].sites:
            self.applied[site].append(name)

    def attempt(self, allowed, deed):
        if allowed:
            deed(self.model)
            return
        with pytest.raises(ValueError, match="wrong base hash|nothing to revert|another change"):
            deed(self.model)

    def check(self, seen):
        """Every weight holds what it held whenever the same changes were applied to it."""
        for site, names in self.applied.items():
            found = fingerprint(find_weight(self.model, site).parameter)
            assert seen.setdefault((site, *names), found) == found
        for name, made in self.changes.items():
            last = all(self.applied[s][-1:] == [name] for s in made.sites)
            assert made.is_applied(self.model) == last

    def unwind(self):
        while any(self.applied.values()):
            for name, made in self.changes.items():
                if all(self.applied[s][-1:] == [name] for s in made.sites):
                    made.revert(self.model)
                    for site in made.sites:
                        self.applied[site].pop()


@pytest.mark.parametrize(
    ("dtype", "sequences"), [(torch.float32, 400), (torch.float16, 300), (torch.bfloat16, 300)]
)
def test_random_sequences_end_where_they_began(small, dtype, sequences):
    small.text_encoder.to(dtype)
    first, second = change(small, [OUT], 1), change(small, [Q, V], 2)
    with first.applied(small):
        third = change(small, [OUT, K, V], 3)  # stands on the first, and beside the second
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
    assert len(seen) >= 9  # the sequences went where they could

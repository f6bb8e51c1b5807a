"""The regularised least squares on random matrices: laws, other formulas, and a value worked by hand."""

import math

import pytest
import torch

from overpaint.edit import least_squares
from overpaint.edit.least_squares import (
    compress,
    contradiction,
    factorise,
    product,
    solve,
)

D_OUT, D_IN, PAIRS, RIDGE = 40, 48, 12, 0.01


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    return {
        "keys": draw(PAIRS, D_IN, seed=1),
        "targets": draw(PAIRS, D_OUT, seed=2),
        "weight": draw(D_OUT, D_IN, seed=3),
    }


def delta(problem, *, ridge=RIDGE, **options):
    return solve(**problem, ridge=ridge, **options).delta


def close(a, b, *, to):
    return float((a - b).norm()) <= to * max(1.0, float(b.norm()))


def test_values_worked_by_hand():
    one = torch.tensor([[1.0, 0.0]])
    moved = solve(one, torch.tensor([[3.0, 0.0]]), weight=torch.eye(2), ridge=1.0)
    assert torch.equal(moved.delta, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    preserved_keys = solve(
        one,
        torch.tensor([[3.0, 0.0]]),
        weight=torch.eye(2),
        ridge=1.0,
        preserve=one,
        preserve_weight=2.0,
    )
    assert preserved_keys.delta[0, 0].item() == pytest.approx(0.5)  # residual 2 over 1 + ridge + 2


@pytest.mark.parametrize("method", ["auto", "dual", "primal"])
@pytest.mark.parametrize("weight_of_preserve", [0.0, 0.1, 10.0])
def test_the_gradient_vanishes_at_the_solution(problem, method, weight_of_preserve):
    k, v, w = problem["keys"], problem["targets"], problem["weight"]
    p = draw(30, D_IN, seed=4)
    d = delta(problem, preserve=p, preserve_weight=weight_of_preserve, method=method)
    gradient = RIDGE * d + (k @ (w + d).T - v).T @ k + weight_of_preserve * d @ p.T @ p
    assert float(gradient.norm()) <= 1e-10 * float((v - k @ w.T).T.matmul(k).norm())


@pytest.mark.parametrize("preserved", [0, 5, 200])
def test_primal_and_dual_agree(problem, preserved):
    options = {"preserve": draw(preserved, D_IN, seed=5), "preserve_weight": 0.3}
    primal = delta(problem, method="primal", **options)
    assert close(delta(problem, method="dual", **options), primal, to=1e-9)


def test_gradient_descent_ends_at_the_solution(problem):
    k, v, w = problem["keys"], problem["targets"], problem["weight"]
    ridge, p, a = 1.0, draw(6, D_IN, seed=6), 0.5
    steepest = torch.linalg.eigvalsh(k.T @ k + a * p.T @ p)[-1] + ridge
    d = torch.zeros_like(w)
    for _ in range(1500):
        d -= ((k @ (w + d).T - v).T @ k + ridge * d + a * d @ p.T @ p) / steepest
    assert close(delta(problem, ridge=ridge, preserve=p, preserve_weight=a), d, to=1e-4)


def test_a_growing_ridge_returns_the_weight_within_its_bound(problem):
    k, v, w = problem["keys"], problem["targets"], problem["weight"]
    for ridge in (1.0, 1e3, 1e9):
        bound = float(((v - k @ w.T).T @ k).norm()) / ridge
        assert float(delta(problem, ridge=ridge).norm()) <= bound


def test_without_keys_the_weight_does_not_move(problem):
    empty = {**problem, "keys": draw(0, D_IN), "targets": draw(0, D_OUT)}
    solution = solve(**empty, ridge=RIDGE)
    assert torch.equal(solution.delta, torch.zeros(D_OUT, D_IN, dtype=torch.float64))
    assert (solution.condition_number, solution.effective_rank) == (1.0, 0)


def test_a_tiny_ridge_meets_the_targets(problem):
    w = problem["weight"] + delta(problem, ridge=1e-11)
    assert close(problem["keys"] @ w.T, problem["targets"], to=1e-8)


def test_targets_that_are_already_met_move_nothing(problem):
    met = {**problem, "targets": problem["keys"] @ problem["weight"].T}
    assert float(delta(met).norm()) <= 1e-10


def test_rank_is_at_most_the_number_of_pairs_and_other_inputs_stay(problem):
    p = draw(100, D_IN, seed=7)
    solution = solve(**problem, ridge=RIDGE, preserve=p, preserve_weight=0.1)
    assert solution.left.shape == (D_OUT, PAIRS) and solution.right.shape == (PAIRS, D_IN)
    d = delta(problem)
    assert int(torch.linalg.matrix_rank(d)) == PAIRS
    basis = torch.linalg.qr(problem["keys"].T)[0]
    z = draw(D_IN, seed=8)
    z -= basis @ (basis.T @ z)
    assert float((d @ z).norm()) <= 1e-12 * float(d.norm() * z.norm())


def test_repeating_pairs_divides_the_ridge_and_their_order_is_free(problem):
    thrice = {
        **problem,
        "keys": problem["keys"].repeat(3, 1),
        "targets": problem["targets"].repeat(3, 1),
    }
    assert close(delta(thrice), delta(problem, ridge=RIDGE / 3), to=1e-9)
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(9))
    mixed = {**problem, "keys": problem["keys"][order], "targets": problem["targets"][order]}
    assert close(delta(mixed), delta(problem), to=1e-12)


def test_more_ridge_moves_less_and_misses_more(problem):
    ridges = [10.0**e for e in range(-4, 5)]
    deltas = [delta(problem, ridge=r) for r in ridges]
    moved = [float(d.norm()) for d in deltas]
    missed = [
        float((problem["keys"] @ (problem["weight"] + d).T - problem["targets"]).norm())
        for d in deltas
    ]
    assert all(a > b for a, b in zip(moved, moved[1:], strict=False))
    assert all(a < b for a, b in zip(missed, missed[1:], strict=False))


def test_a_larger_preserve_weight_moves_preserved_outputs_less(problem):
    p = draw(20, D_IN, seed=10)
    drift = [
        float((delta(problem, preserve=p, preserve_weight=a) @ p.T).norm())
        for a in (0.0, 0.01, 1.0, 100.0, 1e8)
    ]
    assert all(a > b for a, b in zip(drift, drift[1:], strict=False))
    assert drift[-1] <= 1e-5 * drift[0]


def test_preserve_weight_zero_is_the_plain_edit_bit_for_bit(problem):
    preserved_keys = delta(problem, preserve=draw(20, D_IN, seed=10), preserve_weight=0.0)
    assert torch.equal(preserved_keys, delta(problem))


def test_the_formula_of_uce_gives_the_same_weight(problem):
    """UCE in column form: (λW₀ + ΣvkᵀT + aW₀PPᵀ)(λI + ΣkkᵀT + aPPᵀ)⁻¹; without preserve also LocoEdit and TIME."""
    k, v, w = problem["keys"].T, problem["targets"].T, problem["weight"]
    p = draw(20, D_IN, seed=11).T
    for a in (0.0, 0.7):
        numerator = RIDGE * w + v @ k.T + a * w @ p @ p.T
        system = RIDGE * torch.eye(D_IN, dtype=torch.float64) + k @ k.T + a * p @ p.T
        column = torch.linalg.solve(system, numerator, left=False)
        row = torch.linalg.solve(system, numerator.T)  # LocoEdit's form, transposed
        assert close(row.T, column, to=1e-12)
        ours = w + delta(problem, preserve=p.T, preserve_weight=a)
        assert close(ours, column, to=1e-9)


def test_solving_in_sequence_equals_the_joint_solve_only_with_the_first_keys_preserved(problem):
    k, v, w = problem["keys"], problem["targets"], problem["weight"]
    first = {"keys": k[:7], "targets": v[:7], "weight": w}
    moved = w + delta(first)
    second = {"keys": k[7:], "targets": v[7:], "weight": moved}
    carried = moved + delta(second, preserve=k[:7], preserve_weight=1.0)
    joint = w + delta(problem)
    assert close(carried, joint, to=1e-9)
    assert not close(moved + delta(second), joint, to=1e-2)
    swapped = {"keys": k[7:], "targets": v[7:], "weight": w}, {"keys": k[:7], "targets": v[:7]}
    moved = w + delta(swapped[0])
    again = moved + delta({**swapped[1], "weight": moved}, preserve=k[7:], preserve_weight=1.0)
    assert close(again, joint, to=1e-9)


def test_condition_number_and_effective_rank_against_numpy(problem):
    solution = solve(**problem, ridge=0.5)
    system = problem["keys"] @ problem["keys"].T + 0.5 * torch.eye(PAIRS, dtype=torch.float64)
    assert solution.condition_number == pytest.approx(float(torch.linalg.cond(system)), rel=1e-9)
    assert solution.effective_rank == PAIRS
    assert solve(**problem, ridge=1e6).effective_rank == 0


def test_half_precision_inputs_are_solved_in_double(problem):
    half = {name: tensor.half() for name, tensor in problem.items()}
    exact = {name: tensor.double() for name, tensor in half.items()}
    assert delta(half).dtype == torch.float64
    assert torch.equal(delta(half), delta(exact))


@pytest.mark.parametrize("preserved_keys", [0, 20])
@pytest.mark.parametrize("method", ["auto", "dual", "primal"])
def test_one_factorisation_serves_every_weight(problem, method, preserved_keys):
    p, k = draw(preserved_keys, D_IN, seed=21), problem["keys"]
    factors = factorise(
        k, ridge=RIDGE, gram=0.3 * p.T @ p if preserved_keys else None, method=method
    )
    for seed, height in ((22, 8), (23, 40)):
        w, v = draw(height, D_IN, seed=seed), draw(PAIRS, height, seed=seed + 10)
        alone = solve(k, v, weight=w, ridge=RIDGE, preserve=p, preserve_weight=0.3, method=method)
        shared = factors.solve(v - k @ w.T)
        assert close(shared.delta, alone.delta, to=1e-12)
        assert shared.right.data_ptr() == factors.right.data_ptr()
        assert shared.condition_number == pytest.approx(alone.condition_number, rel=1e-9)


@pytest.mark.parametrize("preserved_keys", [0, 20])
def test_more_keys_than_columns_take_the_smaller_system(preserved_keys):
    k, w, v = draw(70, D_IN, seed=24), draw(D_OUT, D_IN, seed=25), draw(70, D_OUT, seed=26)
    p = draw(preserved_keys, D_IN, seed=27)
    options = {"weight": w, "ridge": RIDGE, "preserve": p, "preserve_weight": 0.3}
    small, large = solve(k, v, **options, method="auto"), solve(k, v, **options, method="dual")
    assert (small.right.shape, large.right.shape) == ((D_IN, D_IN), (D_IN, D_IN))
    assert factorise(k, ridge=RIDGE).turn is not None  # the system is 70 x 70
    assert close(small.delta, large.delta, to=1e-9)
    assert small.condition_number == pytest.approx(large.condition_number, rel=1e-9)
    assert small.effective_rank == large.effective_rank
    assert small.effective_rank < D_IN if preserved_keys else small.effective_rank == D_IN


def test_compress_keeps_the_product_and_finds_the_rank(problem):
    d = draw(D_OUT, 3, seed=12) @ draw(3, D_IN, seed=13)
    wide_left, wide_right = draw(D_OUT, 60, seed=14), draw(60, D_IN, seed=15)
    for left, right, rank in (
        (d, torch.eye(D_IN, dtype=torch.float64), 3),
        (d @ draw(D_IN, 5, seed=16), draw(5, D_IN, seed=17), 3),
        (wide_left, wide_right, D_OUT),
        (torch.zeros(D_OUT, 4, dtype=torch.float64), draw(4, D_IN, seed=18), 0),
        (draw(D_OUT, 0), draw(0, D_IN), 0),
    ):
        small = compress(left, right)
        assert small[0].shape == (D_OUT, rank) and small[1].shape == (rank, D_IN)
        assert close(small[0] @ small[1], left @ right, to=1e-9)


def test_contradictions_are_found_and_repeated_rows_are_none(problem):
    k, v = problem["keys"].clone(), problem["targets"].clone()
    assert contradiction(k, v) is None
    k[9], v[9] = k[4], v[4]
    assert contradiction(k, v) is None
    v[9] = v[4] + 0.1
    assert contradiction(k, v) == (4, 9)
    many = draw(2000, 4, seed=19)
    many[1999] = many[1500]
    assert contradiction(many, draw(2000, 2, seed=20)) == (1500, 1999)


def brute_force(k, v, tolerance=1e-6):
    """Compare every pair of rows by the definition."""
    for i in range(len(k)):
        for j in range(i + 1, len(k)):
            same = (k[i] - k[j]).norm() <= tolerance * max(k[i].norm(), k[j].norm())
            if same and (v[i] - v[j]).norm() > 100 * tolerance * max(v[i].norm(), v[j].norm()):
                return i, j
    return None


@pytest.mark.parametrize("seed", range(12))
def test_contradictions_are_those_of_the_definition(seed):
    random = torch.Generator().manual_seed(seed)
    k, v = draw(60, 1 + seed, seed=seed), draw(60, 2, seed=seed + 100)
    k *= 10 ** torch.randn(60, 1, generator=random)  # tolerances are relative
    for _ in range(20):
        to, of = torch.randint(60, (2,), generator=random).tolist()
        by = 10 ** float(torch.randint(-8, -3, (1,), generator=random))
        k[to] = k[of] * (1 + by * 0.3)
        v[to] = v[of] * (1 + 100 * by * 0.3) if random.initial_seed() % 3 else v[to]
    expected = brute_force(k, v)
    assert contradiction(k, v) == expected
    assert contradiction(k.float(), lambda rows: v[rows]) == brute_force(k.float().double(), v)


def test_the_first_contradicting_rows_are_returned():
    k, v = draw(1, 5).repeat(30, 1), draw(1, 3).repeat(30, 1)
    assert contradiction(k, v) is None
    v[17:] += 1.0
    assert contradiction(k, v) == (0, 17)
    distance = torch.linspace(0, 3e-4, 30).double()[
        :, None
    ]  # only the ends of this row are two targets
    assert (
        contradiction(k, v[:1] * (1 + distance))
        == brute_force(k, v[:1] * (1 + distance))
        == (0, 10)
    )


@pytest.mark.parametrize("distinct", [20_000, 40, 1])
def test_few_of_many_keys_are_compared(distinct, monkeypatch):
    k, v = draw(distinct, 32).repeat(20_000 // distinct, 1), draw(distinct, 8)
    compared, distances = [], least_squares._distances

    def count(rows, others):
        compared.append(len(rows) * len(others))
        return distances(rows, others)

    monkeypatch.setattr(least_squares, "_distances", count)
    assert contradiction(k, lambda rows: v[rows % distinct]) is None
    assert sum(compared) < 4_000_000  # all pairs would be 400 million
    k[-1], k[distinct // 2] = k[0], k[0]
    clash = contradiction(k, lambda rows: torch.where(rows[:, None] == 19_999, v[:1] + 1.0, v[:1]))
    assert clash == (0, 19_999)


def test_products_equal_those_in_double():
    a, b = draw(9001, 70, seed=30).float(), draw(9001, 3, seed=31).half()
    assert close(product(a), a.double().T @ a.double(), to=1e-14)
    assert close(product(a, b), a.double().T @ b.double(), to=1e-14)
    assert torch.equal(product(a), product(a).T) and product(a[:0]).abs().max() == 0


@pytest.mark.parametrize("preserved_keys", [0, 20])
def test_sums_give_the_same_solution_where_keys_outnumber_columns(preserved_keys):
    k, w, v = draw(70, D_IN, seed=24), draw(D_OUT, D_IN, seed=25), draw(70, D_OUT, seed=26)
    gram = product(draw(preserved_keys, D_IN, seed=27)) if preserved_keys else None
    r = v - k @ w.T
    factors = factorise(k, ridge=RIDGE, gram=gram, method="auto")
    assert close(factors.solve_sums(r.T @ k).delta, factors.solve(r).delta, to=1e-12)
    assert close(factors.gram, k.T @ k, to=1e-12)
    with pytest.raises(ValueError, match="12 keys of width 48 were not factorised by their sums"):
        factorise(k[:12], ridge=RIDGE, method="auto").solve_sums(r.T @ k)


def test_compress_returns_the_same_right_factor_at_full_rank(problem):
    solution = solve(**problem, ridge=RIDGE)
    left, right = compress(solution.left, solution.right, orthonormal=solution.orthonormal)
    assert close(right @ right.T, torch.eye(PAIRS, dtype=torch.float64), to=1e-12)
    assert right.data_ptr() == solution.right.data_ptr() and torch.equal(left, solution.left)
    spared = torch.cat([solution.left[:, :-1], solution.left[:, :1]], dim=1)  # one column twice
    assert compress(spared, solution.right, orthonormal=True)[0].shape == (D_OUT, PAIRS - 1)


@pytest.mark.parametrize("ridge", [0.0, -0.1, math.nan, math.inf])
def test_a_ridge_that_is_not_positive_is_refused(problem, ridge):
    with pytest.raises(ValueError, match=r"`ridge` must be positive and finite, got .*0\.01 is"):
        solve(**problem, ridge=ridge)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_negative_preserve_weight_is_refused(problem, weight):
    with pytest.raises(ValueError, match="`preserve_weight` must be 0 or more and finite"):
        solve(**problem, ridge=RIDGE, preserve_weight=weight)


def test_an_unknown_solver_is_refused(problem):
    with pytest.raises(
        ValueError, match="the solver must be 'dual' or 'primal', got 'qr'. 'auto' solves"
    ):
        solve(**problem, ridge=RIDGE, method="qr")


@pytest.mark.parametrize("name", ["keys", "targets", "weight", "preserve"])
def test_nan_is_refused_and_the_argument_named(problem, name):
    broken = {**problem, "preserve": draw(2, D_IN)}
    broken[name] = broken[name].clone()
    broken[name][0, 0] = math.nan
    with pytest.raises(ValueError, match=f"`{name}` holds NaN or infinity: look for a damaged"):
        solve(**broken, ridge=RIDGE)


def test_shapes_that_disagree_are_refused(problem):
    with pytest.raises(ValueError, match=r"do not fit a weight \(40, 48\): keys must be \(N, 48\)"):
        solve(problem["targets"], problem["keys"], weight=problem["weight"], ridge=RIDGE)
    with pytest.raises(ValueError, match=r"`preserve` must be \(M, 48\), got \(2, 47\)"):
        solve(**problem, ridge=RIDGE, preserve=draw(2, 47))


def test_a_gram_or_residuals_that_do_not_fit_are_refused(problem):
    k = problem["keys"]
    with pytest.raises(ValueError, match=r"gram \(3, 3\) do not fit .*`gram` \(D_in, D_in\)"):
        factorise(k, ridge=RIDGE, gram=torch.eye(3))
    with pytest.raises(ValueError, match="`gram` is not positive semidefinite.*compute it as"):
        factorise(k, ridge=RIDGE, gram=-torch.eye(D_IN))
    with pytest.raises(ValueError, match="`gram` holds NaN or infinity"):
        factorise(k, ridge=RIDGE, gram=torch.full((D_IN, D_IN), math.nan))
    factors = factorise(k, ridge=RIDGE)
    with pytest.raises(
        ValueError, match=r"residuals \(3, 4\) do not fit 12 keys: give \(N, D_out\)"
    ):
        factors.solve(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="`residuals` holds NaN"):
        factors.solve(torch.full((PAIRS, 4), math.nan))

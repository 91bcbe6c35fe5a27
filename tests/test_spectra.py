"""Spectra: against a float64 SVD, invariances, the numerical rank, refusals."""
import math

import numpy as np
import pytest
import torch
from conftest import gap
from hypothesis import given, strategies as st

from subspace_nb import spectra
from subspace_nb.spectra import (Lazy, as_work, check_share, energy_rank, lift, map_spectrum, map_spectrum_svd, null_mask, numerical_rank,
                                 polar, singular_values, stable_rank, stacked_r, sum_of, svd)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
sizes = st.integers(1, 12)
seeds = st.integers(0, 10**6)

def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed+99), dtype=torch.float64).to(dtype)

def conditioned(seed, out, inn, condition, dtype):
    "A matrix with singular values from 1 down to 1/condition, evenly on a log scale."
    r = min(out, inn)
    u = torch.linalg.qr(randn(seed, out, r))[0]
    v = torch.linalg.qr(randn(seed+1, inn, r))[0]
    return ((u*torch.logspace(0, -math.log10(condition), r, dtype=torch.float64))@v.T).to(dtype)

def reference(dw, fn):
    "U diag(fn(σ)) Vᵀ in numpy, float64."
    u, s, vh = np.linalg.svd(dw.double().numpy(), full_matrices=False)
    return torch.from_numpy((u*fn(torch.from_numpy(s)).numpy())@vh)

# measures

@given(seeds, sizes, sizes)
def test_stable_rank_bounds_and_scale(seed, out, inn):
    dw = randn(seed, out, inn)
    r = stable_rank(dw).item()
    assert 1-1e-9 <= r <= min(out, inn)+1e-9
    assert math.isclose(r, stable_rank(-1e-6*dw).item(), rel_tol=1e-9)
    assert math.isclose(r, stable_rank(dw.T).item(), rel_tol=1e-9)
    assert math.isclose(r, (dw.norm()**2/torch.linalg.matrix_norm(dw, 2)**2).item(), rel_tol=1e-9)

@given(seeds, sizes, sizes, st.floats(0, 1))
def test_energy_rank_is_the_smallest_that_reaches(seed, out, inn, share):
    dw = randn(seed, out, inn)
    k = energy_rank(dw, share).item()
    e = np.linalg.svd(dw.numpy(), compute_uv=False)**2
    assert 1 <= k <= min(out, inn)
    assert e[:k].sum() >= share*e.sum()*(1-1e-9)
    if k>1: assert e[:k-1].sum() < share*e.sum()*(1+1e-9)

@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_energy_rank_grows_with_the_share(seed, a, b):
    dw = randn(seed, 9, 7)
    assert energy_rank(dw, min(a, b)) <= energy_rank(dw, max(a, b))

def test_energy_rank_of_exact_shares():
    eye = torch.eye(10)
    for k in range(1, 11): assert energy_rank(eye, k/10).item()==k      # .3 in binary is no excuse
    assert energy_rank(eye, 0.).item()==1 and energy_rank(eye, 1.).item()==10

def test_measures_of_zero_and_one_by_one():
    zero = torch.zeros(4, 3)
    assert stable_rank(zero)==0 and energy_rank(zero)==0 and numerical_rank(zero)==0
    assert polar(zero).abs().max()==0
    one = torch.full((1, 1), -3.)
    assert stable_rank(one)==1 and energy_rank(one)==1 and polar(one).item()==pytest.approx(-1)

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('fn', (stable_rank, energy_rank, numerical_rank, polar, singular_values))
def test_batch_is_loop(fn, dtype):
    dws = randn(3, 2, 3, 8, 5, dtype=dtype)
    batch = fn(dws)
    loop = torch.stack([torch.stack([fn(m) for m in row]) for row in dws])
    assert batch.shape==loop.shape and torch.allclose(batch.double(), loop.double(), rtol=1e-5, atol=1e-6)

# rewriting a spectrum

@pytest.mark.parametrize('condition', [10.**k for k in range(1, 9)])
@pytest.mark.parametrize('shape', [(40, 40), (48, 24), (24, 48)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_map_spectrum_against_float64_svd(condition, shape, dtype):
    dw = conditioned(5, *shape, condition, dtype)
    tol = 1e-5 if dtype==torch.float32 else 1e-6
    for fn in (torch.ones_like, torch.sqrt, lambda s: lift(s, .5), lambda s: s):
        got = map_spectrum(dw, fn, rank_tol=0)
        assert got.dtype==dtype
        assert gap(got, reference(dw, fn)) < tol

@given(seeds, sizes, sizes, st.sampled_from(DTYPES))
def test_map_spectrum_keeps_shape_and_dtype(seed, out, inn, dtype):
    dw = randn(seed, out, inn, dtype=dtype)
    got = map_spectrum(dw, torch.sqrt)
    assert got.shape==dw.shape and got.dtype==dtype and got.isfinite().all()
    assert map_spectrum_svd(dw, torch.sqrt).dtype==dtype

@given(seeds, sizes, sizes)
def test_polar_is_orthogonal_and_ignores_scale(seed, out, inn):
    dw = conditioned(seed, out, inn, 100., torch.float64)
    p = polar(dw)
    s = torch.linalg.svdvals(p)
    assert torch.allclose(s, torch.ones_like(s), atol=1e-8)
    assert gap(polar(7.5*dw), p) < 1e-8 and gap(polar(-dw), -p) < 1e-8 and gap(polar(dw.T), p.T) < 1e-8
    assert gap(polar(p), p) < 1e-8

@given(seeds, st.floats(1e-3, 1e3), st.floats(0, 1))
def test_boosting_is_homogeneous_and_equivariant(seed, c, beta):
    dw = conditioned(seed, 9, 6, 50., torch.float64)
    boost = lambda m: map_spectrum(m, lambda s: lift(s, beta))
    q, w = (torch.linalg.qr(randn(seed+i, n, n))[0] for i, n in ((5, 9), (6, 6)))
    ref = boost(dw)
    s = torch.linalg.svdvals(dw)
    near = ((s.cumsum(0)/s.sum()-beta).abs()<1e-9).any()        # on a step of the threshold, rounding may choose
    if not near: assert gap(boost(c*dw), c*ref) < 1e-7 and gap(boost(q@dw@w), q@ref@w) < 1e-6

# the lift, against Algorithm 1 written as a loop

def lift_loop(s, beta):
    total, running, s = sum(s), 0., list(s)
    for k, v in enumerate(s):
        running += v
        if running >= beta*total: break
    return [max(v, s[k]) for v in s]

@given(st.lists(st.integers(0, 64), min_size=1, max_size=12), st.integers(0, 16))
def test_lift_is_algorithm_1(values, sixteenths):
    s = sorted(map(float, values), reverse=True)        # whole numbers and sixteenths: no rounding
    beta = sixteenths/16
    got = lift(torch.tensor(s, dtype=torch.float64), beta).tolist()
    assert got==lift_loop(s, beta)

@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_lift_never_lowers_and_falls_with_beta(values, a, b):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    low, high = lift(s, min(a, b)), lift(s, max(a, b))
    assert (high >= s).all() and (low >= high).all()
    assert (lift(s, 0.)==s[0]).all()
    assert (lift(s, s[0].item()/s.sum().item()*(1-1e-9))==s[0]).all()      # any β below σ₁'s share is β = 0
    assert torch.equal(lift(torch.stack([s, 2*s]), a)[0], lift(s, a))

# numerical rank

@given(seeds, st.integers(1, 6), st.sampled_from((torch.float32, torch.float64)))
def test_lora_stays_low_rank(seed, rank, dtype):
    dw = (randn(seed, 40, rank)@randn(seed+1, rank, 24)).to(dtype)
    assert numerical_rank(dw)==rank
    p = polar(dw)
    assert (torch.linalg.svdvals(p.double()) > .5).sum()==rank
    assert gap(p.double().norm(), torch.tensor(rank**.5)) < 1e-4
    u, _, vh = torch.linalg.svd(dw.double(), full_matrices=False)
    assert gap(p, u[:, :rank]@vh[:rank]) < 1e-4

@given(seeds, st.integers(1, 6))
def test_a_stored_difference_stays_low_rank(seed, rank):
    "What one meets in practice: weights of size one in float32, minus their base."
    base = randn(seed+2, 40, 24).float()
    dw = ((base.double()+randn(seed, 40, rank)@randn(seed+1, rank, 24)).float()-base)
    assert numerical_rank(dw)==rank
    assert (torch.linalg.svdvals(polar(dw).double()) > .5).sum()==rank

@given(seeds, st.integers(3, 10), st.integers(1, 3))
def test_rank_tol_zero_is_literal(seed, n, missing):
    "Algorithm 1 to the letter lifts rounding noise as well: full rank, whatever came in."
    rank = max(1, n-missing)
    dw = randn(seed, n+4, rank)@randn(seed+1, rank, n)
    s = torch.linalg.svdvals(polar(dw, rank_tol=0))
    assert torch.allclose(s, torch.ones_like(s), atol=1e-6)

@given(seeds, st.sampled_from((1e-6, 1e-8, 1e-9, 1e-10)))
def test_one_faint_direction_in_float64_is_not_lost(seed, faint):
    "Squaring the matrix would drown it; in float64 it is far above the rounding unit."
    q, w = (torch.linalg.qr(randn(seed+i, 8, 8))[0] for i in range(2))
    s = torch.tensor([1., .9, .8, .7, .6, .5, .4, faint], dtype=torch.float64)
    assert (torch.linalg.svdvals(polar((q*s)@w)) > .5).sum()==8

@given(seeds, st.floats(1e-6, .5))
def test_rank_tol_cuts_where_it_says(seed, tol):
    dw = conditioned(seed, 12, 12, 1e4, torch.float64)
    s = torch.linalg.svdvals(dw)
    if ((s/s[0]/tol-1).abs() < 1e-6).any(): return
    expected = (s > tol*s[0]).sum()
    assert numerical_rank(dw, tol)==expected
    assert (torch.linalg.svdvals(polar(dw, tol)) > .5).sum()==expected

@pytest.mark.parametrize('condition', (1e2, 1e4, 1e6))
def test_a_smooth_decay_keeps_its_rank(condition):
    assert numerical_rank(conditioned(3, 64, 48, condition, torch.float32))==48

def test_null_mask_cliff():
    eps = 1.2e-7
    s = torch.cat([torch.tensor([1., .5, .4]), 1e-6*torch.rand(300).sort(descending=True).values])
    assert null_mask(s, 1000, eps).tolist()==[False]*3+[True]*300
    assert not null_mask(torch.logspace(0, -6, 30), 1000, eps).any()                                   # no cliff, no rank
    assert not null_mask(torch.cat([torch.ones(199), torch.tensor([1e-4])]), 200, eps).any()           # one small value is no noise
    assert null_mask(torch.zeros(3), 3, 1e-7).all()
    both = torch.stack([s, torch.logspace(0, -4, 303)])
    assert torch.equal(null_mask(both, 1000, eps), torch.stack([null_mask(b, 1000, eps) for b in both]))

def test_full_square_matrices_keep_all_their_directions():
    "Their smallest singular value may be a thousand times below the next by chance."
    rng = torch.Generator().manual_seed(0)
    for _ in range(300): assert numerical_rank(torch.randn(24, 24, generator=rng))==24

@pytest.mark.parametrize('scale', (1., 30., 300.))
def test_low_rank_is_seen_behind_the_rounding_of_larger_weights(scale):
    dw = randn(1, 128, 8)@randn(2, 8, 96)
    w = scale*randn(3, 128, 96)
    assert numerical_rank((w+dw)-w)==8

# refusals: the exception names the parameter

@given(st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=1+1e-9), st.just(float('nan'))))
def test_shares_outside_are_refused(value):
    dw, s = torch.eye(3), torch.ones(3)
    with pytest.raises(ValueError, match='some_name'): check_share(value, 'some_name')
    with pytest.raises(ValueError, match='beta'): lift(s, value)
    with pytest.raises(ValueError, match='share'): energy_rank(dw, value)

@pytest.mark.parametrize('value', (None, 'half', '.5', [.5], 1j, True, {}))
def test_shares_that_are_no_numbers_are_refused(value):
    with pytest.raises(TypeError, match='beta'): lift(torch.ones(3), value)
    with pytest.raises(TypeError, match='share'): energy_rank(torch.eye(3), value)

@given(st.one_of(st.floats(max_value=-1e-12), st.floats(min_value=1), st.just(float('nan')), st.sampled_from(['0', [0], True, {}])))
def test_rank_tol_is_refused(value):
    for fn in (polar, numerical_rank):
        with pytest.raises((ValueError, TypeError), match='rank_tol'): fn(torch.eye(3), value)

bad_matrices = {
    'list': [[1., 2.]], 'number': 1., 'none': None, 'numpy': np.eye(2), 'scalar': torch.tensor(1.), 'vector': torch.ones(3),
    'no rows': torch.ones(0, 3), 'no columns': torch.ones(3, 0), 'int': torch.ones(2, 2, dtype=torch.int64),
    'bool': torch.ones(2, 2, dtype=torch.bool), 'complex': torch.ones(2, 2, dtype=torch.complex64)}

@pytest.mark.parametrize('name', bad_matrices)
@pytest.mark.parametrize('fn', (svd, singular_values, stable_rank, energy_rank, numerical_rank, polar, lambda m: map_spectrum(m, torch.sqrt)))
def test_what_is_no_matrix_is_refused(fn, name):
    with pytest.raises((ValueError, TypeError), match='dw'): fn(bad_matrices[name])

@given(st.sampled_from(DTYPES), st.sampled_from((float('nan'), float('inf'), -float('inf'))), st.integers(0, 3), st.integers(0, 2), st.booleans())
def test_non_finite_entries_are_refused(dtype, bad, i, j, batched):
    dw = torch.ones(4, 3, dtype=dtype)
    dw[i, j] = bad
    if batched: dw = torch.stack([torch.ones_like(dw), dw])
    for fn in (svd, singular_values, stable_rank, energy_rank, numerical_rank, polar):
        with pytest.raises(ValueError, match='dw'): fn(dw)

@pytest.mark.parametrize('dtype', DTYPES)
def test_working_precision(dtype):
    assert as_work(torch.ones(2, dtype=dtype)).dtype==(torch.float64 if dtype==torch.float64 else torch.float32)

def planted(m, n, s, seed, dtype=torch.float64):
    "A matrix with chosen singular values."
    rng = torch.Generator().manual_seed(seed)
    q = lambda k: torch.linalg.qr(torch.randn(k, n, generator=rng, dtype=torch.float64))[0]
    return ((q(m)*s)@q(n).mT).to(dtype)

@pytest.mark.parametrize('shape', [(96, 96), (240, 96), (96, 240)])
@pytest.mark.parametrize('faint', [1, 7, 48])
@pytest.mark.parametrize('floor', [1e-5, 1e-7, 1e-9])
def test_faint_directions_without_the_plain_svd(shape, faint, floor, monkeypatch):
    n = min(shape)
    s = torch.cat([torch.logspace(0, -2, n-faint, dtype=torch.float64), torch.logspace(-4.3, math.log10(floor), faint, dtype=torch.float64)])
    dw = planted(max(shape), n, s, seed=faint).float()
    dw = dw if shape[0]>=shape[1] else dw.mT
    for fn in (torch.ones_like, lambda s: lift(s, .3)):
        want = spectra.map_spectrum_svd(dw, fn, 0.)
        with monkeypatch.context() as m:
            m.setattr(spectra, 'map_spectrum_svd', lambda *a: pytest.fail('not needed here'))
            got = map_spectrum(dw, fn, 0.)
        assert (got-want).norm()<1e-5*want.norm()

def test_null_directions_stay_null_beside_faint_ones():
    s = torch.cat([torch.logspace(0, -3, 60, dtype=torch.float64), torch.full((6,), 3e-5, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)])
    dw = planted(128, 96, s, seed=3)                          # exact zeros but for the rounding of float64
    out = map_spectrum(dw, torch.ones_like, 1e-9)
    assert (singular_values(out)>.5).sum()==66
    assert (out-spectra.map_spectrum_svd(dw, torch.ones_like, 1e-9)).norm()<1e-6*66**.5

# one matrix at a time

def test_lazy_lists():
    asked = []
    lazy = Lazy(3, lambda i: asked.append(i) or randn(i, 2, 2))
    assert len(lazy)==3 and not asked and torch.equal(lazy[-1], randn(2, 2, 2)) and [torch.equal(w, randn(i, 2, 2)) for i, w in enumerate(lazy)]==[True]*3 and asked==[2, 0, 1, 2]
    for i in (3, -4):
        with pytest.raises(IndexError, match='3 matrices'): lazy[i]
    with pytest.raises(IndexError, match='from within'): list(Lazy(2, lambda i: exec("raise IndexError('from within')")))      # not taken for the list's end

@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('room', [0, 2**26])
def test_sums_leave_the_items_as_they_are(threads, room):
    ws = [randn(i, 3, 4) for i in range(5)]
    kept, before = [w.clone() for w in ws], torch.get_num_threads()
    torch.set_num_threads(threads)
    try: total = sum_of(lambda w: w, ws, room)
    finally: torch.set_num_threads(before)
    assert torch.equal(total, sum(kept)) and all(map(torch.equal, ws, kept)) and torch.equal(sum_of(lambda w: w, ws[:1]), kept[0])

@pytest.mark.parametrize('room', [0, 200, 2**26])
@pytest.mark.parametrize('rows', [(5, 5, 5), (1, 1), (2, 9, 1)])
def test_triangular_factor_of_a_stack(rows, room):
    ws = [10.**-i*randn(i, 2, m, 4) for i, m in enumerate(rows)]
    r, stack = stacked_r(ws, room), torch.cat(ws, -2)
    assert r.shape==(2, min(4, sum(rows)), 4) and torch.equal(r, r.triu()) and gap(r.mT@r, stack.mT@stack)<1e-13

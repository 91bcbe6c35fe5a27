"The four propositions over random draws, their counter-examples, an oracle for the t quantile, and refusals."
import math
import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st
from conftest import gap
from subspace_nb.spectra import singular_values, stable_rank
from subspace_nb.theory import (average_bound, breakeven_floor, correlated_components, direction_survival, dominance_bound, dominance_ratio, mean_similarity,
                                orthogonal_components, partial_sums, planted_tail, reconstruction_errors, scrambled, slope_interval, stable_rank_interval, student_t)

seeds = st.integers(0, 10**6)
shapes = st.tuples(st.integers(2, 9), st.integers(2, 9))
near = 1+1e-9


@st.composite
def components(draw, extra=0): # n, shape, norms, seed with n + extra <= out·in
    shape = draw(shapes)
    n = draw(st.integers(1, min(shape[0]*shape[1]-extra, 24)))
    return n, shape, draw(st.lists(st.floats(.01, 10), min_size=n, max_size=n)), draw(seeds)


# ---- draws

@given(components())
def test_components_are_orthogonal_with_their_norms(args):
    n, shape, norms, seed = args
    e = orthogonal_components(n, shape, norms, seed)
    flat = e.flatten(1)
    assert e.shape==(n, *shape) and e.dtype==torch.float64
    assert torch.allclose(flat@flat.mT, torch.tensor(norms, dtype=torch.float64).square().diag(), atol=1e-9)
    assert torch.equal(e, orthogonal_components(n, shape, norms, seed))


@given(components(), st.data())
def test_fewer_components_are_the_first_of_more(args, data):
    n, shape, norms, seed = args
    k = data.draw(st.integers(1, n))
    assert gap(orthogonal_components(k, shape, norms[:k], seed), orthogonal_components(n, shape, norms, seed)[:k])<1e-9


@given(components(1), st.floats(0, 1))
def test_correlated_components(args, rho):
    n, shape, norms, seed = args
    e = correlated_components(n, shape, norms, rho, seed)
    flat = e.flatten(1)
    norm = torch.tensor(norms, dtype=torch.float64)
    want = norm[:, None]*norm*(rho+(1-rho)*torch.eye(n, dtype=torch.float64))
    assert torch.allclose(flat@flat.mT, want, atol=1e-8)
    assert mean_similarity(e).item()==pytest.approx((1+(n-1)*rho)/n, abs=1e-9)


def test_full_space_can_be_filled_but_not_more():
    e = orthogonal_components(12, (3, 4)).flatten(1)
    assert torch.allclose(e@e.mT, torch.eye(12, dtype=e.dtype), atol=1e-9)
    with pytest.raises(ValueError, match='n must be at most 12'): orthogonal_components(13, (3, 4))
    with pytest.raises(ValueError, match='n must be at most 11'): correlated_components(12, (3, 4))


def test_directions_are_uniform():
    e = torch.stack([orthogonal_components(2, (2, 3), seed=s)[1].flatten() for s in range(600)])
    assert e.mean(0).abs().max()<.07 and torch.allclose(e.mT@e/600, torch.eye(6, dtype=e.dtype)/6, atol=.04)


@given(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_partial_sums(extra, counts):
    x = torch.randn(6, 2, extra, generator=torch.Generator().manual_seed(extra), dtype=torch.float64)
    for got, n in zip(partial_sums(x, counts), counts): assert torch.allclose(got, x[:n].sum(0))


@pytest.mark.parametrize('counts', [[], [0], [7], [1.5], 3, [[1, 2]], [-1]])
def test_partial_sums_refuses(counts):
    with pytest.raises(ValueError, match='counts'): partial_sums(torch.zeros(6, 2, 2), counts)


# ---- intervals

@pytest.mark.parametrize('level, dof, t', [(.95, 1, 12.7062), (.95, 4, 2.77645), (.99, 7, 3.49948), (.9, 10, 1.81246), (.95, 120, 1.97993), (.5, 3, .764892)])
def test_student_t_against_printed_tables(level, dof, t): assert student_t(level, dof)==pytest.approx(t, rel=1e-5)


@given(st.floats(.01, .995), st.integers(1, 60))
def test_student_t_against_the_density(level, dof):
    t = student_t(level, dof)
    x = torch.linspace(0, t, 20001, dtype=torch.float64)
    assert 2*torch.trapezoid(torch.distributions.StudentT(torch.tensor(float(dof), dtype=torch.float64)).log_prob(x).exp(), x).item()==pytest.approx(level, abs=1e-5)


def test_slope_interval_covers_as_often_as_it_says():
    rng = torch.Generator().manual_seed(0)
    x = torch.tensor([1., 2, 4, 8, 16])
    hits = 0
    for _ in range(600):
        slope, low, high = slope_interval(x, x[:, None]**-.5*(.2*torch.randn(5, 6, generator=rng)).exp())
        assert low<slope<high
        hits += low<=-.5<=high
    assert .92<hits/600<.98


@given(st.floats(-2, 2), st.floats(.1, 10))
def test_slope_of_a_power_law(p, c):
    x = torch.tensor([1., 3, 5, 9], dtype=torch.float64)
    assert slope_interval(x, c*x[:, None]**p*torch.tensor([1., 2., 3.]))==pytest.approx((p, p, p), abs=1e-6)


@pytest.mark.parametrize('fn, name', [
    (lambda: student_t(0, 3), 'level'), (lambda: student_t(1, 3), 'level'), (lambda: student_t(math.nan, 3), 'level'), (lambda: student_t(.9, 0), 'dof'),
    (lambda: slope_interval([1, 2, 4], torch.ones(3)), 'values'), (lambda: slope_interval([1, 2, 4], torch.ones(3, 1)), 'values'),
    (lambda: slope_interval([1, 2, 4], torch.zeros(3, 2)), 'values'), (lambda: slope_interval([1, 2], torch.ones(2, 2)), 'counts')])
def test_interval_refusals(fn, name):
    with pytest.raises(ValueError, match=name): fn()


# ---- proposition 1

@given(components())
def test_prop1_holds_in_every_draw(args):
    n, shape, norms, seed = args
    s = singular_values(orthogonal_components(n, shape, norms, seed).mean(0))
    for i in range(len(s)): assert s[i]<=average_bound(max(norms), n, index=i+1)*near
    assert s.norm().item()==pytest.approx(np.linalg.norm(norms)/n)                       # the energy is known exactly


@given(components(1), st.floats(0, 1))
def test_prop1_with_correlation(args, rho):
    n, shape, norms, seed = args
    assert singular_values(correlated_components(n, shape, norms, rho, seed).mean(0))[0]<=average_bound(max(norms), n, rho)*near


@given(st.integers(1, 12), st.floats(.1, 5))
def test_prop1_is_tight_for_one_input_direction(n, b):
    v = torch.randn(12, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    e = b*torch.eye(12, dtype=torch.float64)[:n, :, None]*(v/v.norm())
    assert singular_values(e.mean(0))[0].item()==pytest.approx(average_bound(b, n).item())


def test_prop1_needs_orthogonality():
    e = correlated_components(60, (8, 8), rho=.2)
    assert e.mean(0).norm()>3*average_bound(1., 60) and e.mean(0).norm()>.2**.5


def test_average_bound_broadcasts_and_falls():
    b = average_bound(torch.tensor([[1.], [2.]]), torch.arange(1, 6))
    assert b.shape==(2, 5) and (b.diff()<0).all() and b.dtype==torch.float64


@pytest.mark.parametrize('kw, name', [(dict(b=-1., n=2), 'b must'), (dict(b=math.nan, n=2), 'b must'), (dict(b=1., n=0), 'n must'), (dict(b=1., n=2, rho=1.1), 'rho'),
                                      (dict(b=1., n=2, rho=-.1), 'rho'), (dict(b=1., n=2, index=0), 'index')])
def test_average_bound_refuses(kw, name):
    with pytest.raises(ValueError, match=name): average_bound(**kw)


# ---- proposition 2

@given(components(), st.floats(0, 20))
def test_prop2_interval_holds(args, scale):
    n, shape, norms, seed = args
    common = scale*torch.randn(shape, generator=torch.Generator().manual_seed(seed+1), dtype=torch.float64)
    unique = orthogonal_components(n, shape, norms, seed).mean(0)
    got = stable_rank(common+unique)
    for e in (unique.norm(), average_bound(max(norms), n)):
        low, high = stable_rank_interval(common, e)
        assert low/near<=got<=high*near and 0<=low<=high*near<=min(shape)*near**2


def test_prop2_limit_and_rate():
    c = torch.diag(torch.tensor([3., 2, 1, .5], dtype=torch.float64))
    low, high = stable_rank_interval(c, torch.tensor([1e-2, 1e-4, 1e-6]))
    assert ((high-low)[:-1]/(high-low)[1:]).numpy()==pytest.approx([100, 100], rel=.1)      # closes in proportion to the noise
    assert low[2].item()==pytest.approx(stable_rank(c).item(), abs=1e-5)


def test_prop2_batches():
    c = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    low, high = stable_rank_interval(c, .1)
    assert low.shape==high.shape==(3, 2) and (low<=stable_rank(c)).all() and (stable_rank(c)<=high).all()
    one = stable_rank_interval(c[1, 1], .1)
    assert low[1, 1].item()==pytest.approx(one[0].item()) and high[1, 1].item()==pytest.approx(one[1].item())


def test_prop2_counter_example():
    c = torch.zeros(10, 10, dtype=torch.float64); c[0, 0] = 1
    unique = correlated_components(90, (10, 10), 3., .3, seed=0)
    g = orthogonal_components(1, (10, 10), seed=0)[0]
    got, limit = stable_rank(c+unique.mean(0)).item(), stable_rank(c+3*.3**.5*g).item()
    assert got==pytest.approx(limit, rel=.15) and got>1.5


def test_prop2_needs_a_common_part():
    low, high = stable_rank_interval(torch.zeros(4, 6), .5)
    assert low==0 and high==4
    with pytest.raises(ValueError, match='noise'): stable_rank_interval(torch.eye(3), -.1)
    with pytest.raises(ValueError, match='noise'): stable_rank_interval(torch.eye(3), math.nan)
    with pytest.raises(ValueError, match='common'): stable_rank_interval(torch.full((2, 2), math.nan), .1)


# ---- proposition 3

@given(st.integers(1, 3), st.integers(1, 12), st.floats(0, 1), st.floats(1, 3), st.floats(1, 4), seeds, st.floats(1e-3, 1e3), st.booleans())
def test_prop3_holds_in_every_draw(r, n, rho, spread, b, seed, alpha, negative):
    assume(n+1<=r*8)
    rng = torch.Generator().manual_seed(seed)
    norms = 1+(spread-1)*torch.rand(n, generator=rng, dtype=torch.float64)
    p = torch.linalg.qr(torch.randn(7, r, generator=rng, dtype=torch.float64))[0]
    common, unique = p@correlated_components(n, (r, 8), norms, rho, seed), orthogonal_components(n, (7, 8), b*norms, seed+1)
    a = -alpha if negative else alpha
    bound = lambda rank: dominance_bound(n, norms.min(), b*norms.max(), mean_similarity(common), rank)
    assert dominance_ratio(a*common, a*unique)>=bound(r)/near
    assert dominance_ratio(a*common, a*unique, 'fro')>=bound(1)/near


@given(st.integers(1, 8), st.integers(1, 8), st.floats(.1, 10), st.floats(.1, 10))
def test_prop3_is_tight(n, r, mu, b):
    common = mu/r**.5*torch.eye(8, 9, dtype=torch.float64)*(torch.arange(8)<r)[:, None]
    unique = b*torch.eye(8, dtype=torch.float64)[:n, :, None]*torch.full((9,), 1/3, dtype=torch.float64)
    assert dominance_ratio(common.expand(n, -1, -1), unique).item()==pytest.approx(dominance_bound(n, mu, b, 1., r).item())


def test_prop3_says_nothing_for_orthogonal_common_parts():
    for n in (2, 20, 60):
        c, u = orthogonal_components(n, (8, 8), seed=1), orthogonal_components(n, (8, 8), seed=2)
        rho = mean_similarity(c)
        assert rho.item()==pytest.approx(1/n) and dominance_bound(n, 1., 1., rho).item()==pytest.approx(1)
        assert dominance_ratio(c, u, 'fro').item()==pytest.approx(1)


def test_prop3_mean_cosine_is_not_enough_with_signs():
    g = orthogonal_components(1, (4, 4))[0]
    c = torch.stack([g, g, -2*g])
    assert mean_similarity(c)>0 and dominance_ratio(c, orthogonal_components(3, (4, 4), seed=1))<1e-9<dominance_bound(3, 1., 1., mean_similarity(c), 1)


@given(st.lists(st.tuples(st.floats(.1, 5), st.sampled_from([-1, 1])), min_size=1, max_size=8))
def test_mean_similarity_ignores_lengths(parts):
    g = orthogonal_components(1, (3, 3))[0]
    x = torch.stack([s*c*g for c, s in parts])
    assert mean_similarity(x).item()==pytest.approx(np.mean([s for _, s in parts])**2, abs=1e-9)


@pytest.mark.parametrize('fn, name', [
    (lambda: dominance_bound(0, 1., 1., 1.), 'n must'), (lambda: dominance_bound(2, -1., 1., 1.), 'mu'), (lambda: dominance_bound(2, 1., 0., 1.), 'b must'),
    (lambda: dominance_bound(2, 1., 1., 1.5), 'rho'), (lambda: dominance_bound(2, 1., 1., 1., 0), 'rank'), (lambda: dominance_bound(2, math.nan, 1., 1.), 'mu'),
    (lambda: dominance_ratio(torch.ones(2, 3, 3), torch.ones(3, 3, 3)), 'common and unique'), (lambda: dominance_ratio(torch.ones(3, 3), torch.ones(3, 3)), 'common and unique'),
    (lambda: dominance_ratio(torch.ones(2, 3, 3), torch.zeros(2, 3, 3)), 'unique sums to zero'), (lambda: dominance_ratio(torch.ones(2, 3, 3), torch.ones(2, 3, 3), 1), 'ord'),
    (lambda: dominance_ratio(torch.full((2, 3, 3), math.inf), torch.ones(2, 3, 3)), 'common has NaN'), (lambda: mean_similarity(torch.zeros(2, 3, 3)), 'mats')])
def test_prop3_refusals(fn, name):
    with pytest.raises(ValueError, match=name): fn()


# ---- proposition 4

tails = st.tuples(st.integers(1, 6), st.integers(0, 6), seeds)

@given(tails, st.floats(.2, 5), st.integers(12, 16), st.integers(12, 16))
def test_prop4_holds_under_its_assumptions(tail, floor, out, width):
    r, d, seed = tail
    s, z = planted_tail((out, width), r, d, True, seed)
    signal, faint = floor*s, 1e-5*floor*(s+z)
    plain, boosted = reconstruction_errors(signal, faint, floor)
    assert plain.item()==pytest.approx(r*floor**2, rel=1e-4) and boosted.item()==pytest.approx(d*floor**2, abs=1e-6*floor**2)
    assert direction_survival(signal, faint).item()==pytest.approx(1, abs=1e-6)
    if r!=d: assert (boosted<plain).item()==(r*floor**2>d*floor**2)


@given(tails, st.booleans(), st.floats(.1, 10), st.floats(.1, 10), st.floats(.01, 5))
def test_exact_condition_decides(tail, apart, size, strength, share):
    r, d, seed = tail
    s, z = planted_tail((14, 12), r, d, apart, seed)
    signal, faint = size*s, 1e-6*(size*s+strength*z)
    limit = breakeven_floor(signal, faint).item()
    assume(limit>1e-3 and abs(share-1)>.02)
    plain, boosted = reconstruction_errors(signal, faint, share*limit)
    assert (boosted<plain).item()==(share<1)


@given(tails, st.booleans(), st.floats(.1, 10))
def test_survival_is_at_most_one(tail, apart, strength):
    r, d, seed = tail
    s, z = planted_tail((14, 12), r, d, apart, seed)
    got = direction_survival(s, s+strength*z).item()
    assert -1e-9<=got<=1+1e-9
    if apart: assert got==pytest.approx(1, abs=1e-6)
    assert direction_survival(s, -(s+strength*z)).item()==pytest.approx(-got, abs=1e-9)
    assert direction_survival(3*s, 7*(s+strength*z)).item()==pytest.approx(got, abs=1e-9)


def test_noise_rotates_directions():
    s, z = planted_tail((24, 24), 8, 12, False, 0)
    got = [direction_survival(s, s+x*z).item() for x in (.1, 1., 10.)]
    assert got[0]>.98 and got[0]>got[1]>got[2] and got[2]<.8


def test_planted_tail_is_flat_and_apart():
    s, z = planted_tail((9, 7), 3, 4)
    assert torch.allclose(singular_values(s)[:3], torch.ones(3, dtype=s.dtype)) and singular_values(s)[3]<1e-9
    assert torch.allclose(singular_values(z)[:4], torch.ones(4, dtype=s.dtype)) and (s@z.mT).norm()+(s.mT@z).norm()<1e-9
    s, z = planted_tail((9, 7), 3, 4, False)
    assert (s@z.mT).norm()>.1
    assert planted_tail((5, 5), 2, 0)[1].norm()==0


def test_prop4_batches_and_precisions():
    pairs = [planted_tail((10, 8), 3, 4, False, s) for s in range(4)]
    s, z = (torch.stack(x) for x in zip(*pairs))
    plain, boosted = reconstruction_errors(s, .01*(s+z), 1.)
    assert plain.shape==boosted.shape==direction_survival(s, s+z).shape==breakeven_floor(s, s+z).shape==(4,)
    for i in range(4): assert reconstruction_errors(s[i], .01*(s[i]+z[i]), 1.)[1].item()==pytest.approx(boosted[i].item())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.allclose(direction_survival(s.to(dtype), (s+z).to(dtype)).double(), direction_survival(s, s+z), atol=.05)


@pytest.mark.parametrize('fn, name', [
    (lambda: reconstruction_errors(torch.ones(2, 3), torch.ones(3, 2), 1.), 'signal and update'), (lambda: reconstruction_errors(torch.ones(2, 3), torch.ones(2, 3), -1.), 'floor'),
    (lambda: reconstruction_errors(torch.ones(2, 3), torch.ones(2, 3), math.nan), 'floor'), (lambda: direction_survival(torch.zeros(2, 3), torch.ones(2, 3)), 'signal'),
    (lambda: direction_survival(torch.ones(2, 3), torch.full((2, 3), math.nan)), 'update'), (lambda: breakeven_floor(torch.ones(2), torch.ones(2)), 'signal'),
    (lambda: breakeven_floor(torch.ones(2, 2), torch.zeros(2, 2)), 'update'),
    (lambda: planted_tail((4, 4), 3, 2), 'signal_rank'), (lambda: planted_tail((4, 4), 0, 2), 'signal_rank'), (lambda: planted_tail((4, 4), 1, -1), 'noise_rank'), (lambda: planted_tail(4, 1, 1), 'shape')])
def test_prop4_refusals(fn, name):
    with pytest.raises(ValueError, match=name): fn()


# ---- scrambling, and draws that cannot be made

@given(shapes, seeds)
def test_scrambled_keeps_spectrum_and_entries(shape, seed):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = scrambled(x, seed)
    assert torch.allclose(singular_values(x), singular_values(y), atol=1e-10)
    assert torch.allclose(x.abs().flatten(1).sort().values, y.abs().flatten(1).sort().values)
    assert torch.equal(y, scrambled(x, seed))


def test_scrambled_destroys_relations():
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    cos = [torch.cosine_similarity(scrambled(x, s).flatten(), x.flatten(), 0).abs().item() for s in range(20)]
    assert max(cos)<.15
    both = scrambled(torch.stack([x, x]), 0)
    assert not torch.equal(both[0], both[1]) and scrambled(x.bfloat16()).dtype==torch.bfloat16


@pytest.mark.parametrize('kw, error, name', [
    (dict(n=0, shape=(2, 2)), ValueError, 'n must'), (dict(n=1.5, shape=(2, 2)), TypeError, 'n must'), (dict(n=True, shape=(2, 2)), TypeError, 'n must'),
    (dict(n=2, shape=(2,)), ValueError, 'shape'), (dict(n=2, shape=4), ValueError, 'shape'), (dict(n=2, shape=(0, 9)), ValueError, 'shape'),
    (dict(n=2, shape=(2, 2), norms=[1., 2., 3.]), ValueError, 'norms'), (dict(n=2, shape=(2, 2), norms=-1.), ValueError, 'norms'),
    (dict(n=2, shape=(2, 2), norms=math.nan), ValueError, 'norms')])
def test_draw_refusals(kw, error, name):
    for fn in (orthogonal_components, correlated_components):
        with pytest.raises(error, match=name): fn(**kw)
    with pytest.raises(ValueError, match='rho'): correlated_components(2, (2, 2), rho=-.1)
    with pytest.raises(TypeError, match='rho'): correlated_components(2, (2, 2), rho='x')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_same_on_gpu():
    s, z = planted_tail((16, 12), 4, 5, False, 0)
    for fn in (direction_survival, breakeven_floor): assert fn(s.cuda(), (s+z).cuda()).item()==pytest.approx(fn(s, s+z).item(), abs=1e-8)
    c, u = correlated_components(6, (8, 8), rho=.3), orthogonal_components(6, (8, 8), seed=1)
    assert dominance_ratio(c.cuda(), u.cuda()).item()==pytest.approx(dominance_ratio(c, u).item())
    assert gap(partial_sums(c.cuda(), [1, 4]).cpu(), partial_sums(c, [1, 4]))<1e-12 and gap(scrambled(c.cuda(), 3).cpu(), scrambled(c, 3))<1e-12
    for a, b in zip(reconstruction_errors(s.cuda(), .01*(s+z).cuda(), 1.), reconstruction_errors(s, .01*(s+z), 1.)): assert a.item()==pytest.approx(b.item(), abs=1e-8)
    for a, b in zip(stable_rank_interval(c.cuda(), .1), stable_rank_interval(c, .1)): assert torch.allclose(a.cpu(), b)

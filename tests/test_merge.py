"""Merging: against plain re-implementations of the papers' formulas, invariances, refusals."""
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHAPES, gap, make_tau, make_taus
from hypothesis import given, strategies as st

from subspace_nb.merge import (agreement, in_pieces, l1_norm, average, breadcrumbs, choose_alpha, consensus, dare, lines, lines_factors, model_stock, paper_grid, search,
                               stock_ratio, tall_masks, task_arithmetic, ties, trim_threshold)
from subspace_nb.tasks import TaskVector

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
zero = make_tau(0)*0
stock = lambda taus: model_stock(taus, zero)
ruled = lambda taus: lines(task_arithmetic(taus), taus, slope=.3)
methods = {'average': average, 'task_arithmetic': task_arithmetic, 'ties': ties, 'dare': dare, 'breadcrumbs': breadcrumbs,
           'model_stock': stock, 'consensus': consensus, 'lines': ruled}
each = pytest.mark.parametrize('method', list(methods.values()), ids=list(methods))
experts = st.builds(make_taus, st.integers(2, 6), seed=st.integers(0, 50))

def whole(seed, n, size=24): # small whole numbers: ties, zeros and cancellation happen
    rng = torch.Generator().manual_seed(seed+1)
    taus = [TaskVector({'a': torch.randint(-3, 4, (size//2,), generator=rng).double(), 'b': torch.randint(-3, 4, (2, size//4), generator=rng).double()}) for _ in range(n)]
    for i, t in enumerate(taus): t['a'][0] = i+5       # no two alike
    return taus

whole_taus = st.builds(whole, st.integers(0, 10**4), st.integers(1, 5))

# oracles: flat vectors, loops, numpy

def flats(taus): return np.stack([t.flat().double().numpy() for t in taus])

def ties_loop(taus, keep):
    flat = flats(taus)
    n, p = flat.shape
    for row in flat:
        threshold = sorted(abs(row))[max(0, p-int(keep*p)-1)]
        for j in range(p):
            if abs(row[j]) < threshold: row[j] = 0
    signs = [np.sign(sum(flat[:, j])) for j in range(p)]
    majority = np.sign(sum(signs))
    signs = [s if s!=0 else majority for s in signs]
    out = np.zeros(p)
    for j in range(p):
        agree = [v for v in flat[:, j] if (v>0 if signs[j]>0 else v<0)]
        out[j] = sum(agree)/max(1, len(agree))
    return out

def masks_loop(taus, lams):
    flat = flats(taus)
    n, p = flat.shape
    return [[abs(flat[t, j]) > lams[t]*abs(sum(flat[i, j] for i in range(n) if i!=t)) for j in range(p)] for t in range(n)]

def consensus_loop(taus, lams, agree):
    flat = flats(taus)
    votes = np.sum(masks_loop(taus, lams), axis=0)
    return np.array([sum(flat[:, j]) if votes[j]>=agree else 0. for j in range(flat.shape[1])])

def breadcrumbs_loop(taus, density, gamma):
    out = []
    for k in taus[0]:
        total = np.zeros(taus[0][k].numel())
        for t in taus:
            w = t[k].double().numpy().ravel()
            n = len(w)
            top = int(gamma*n)
            low = max(0, n-int(density*n)-top)
            for rank, j in enumerate(sorted(range(n), key=lambda j: abs(w[j]))):
                if low <= rank < n-top: total[j] += w[j]
        out.append(total)
    return np.concatenate(out)

def stock_loop(taus):
    out = []
    for k in taus[0]:
        ws = [t[k].double().numpy().ravel() for t in taus]
        n = len(ws)
        pairs = list(itertools.combinations(range(n), 2))
        c = sum(ws[i]@ws[j]/(np.linalg.norm(ws[i])*np.linalg.norm(ws[j])) for i, j in pairs)/len(pairs)
        den = 1+(n-1)*c
        t = max(-1, n*c/den) if den>1e-9 else -1
        out.append(t*np.mean(ws, axis=0))
    return np.concatenate(out)

def lines_loop(tau, taus, slope, start):
    if start is None: start = abs(flats(taus).sum(0)).sum()/abs(tau.flat().numpy()).sum()/len(taus)
    depth = {'visual.conv1.weight': None, 'logit_scale': None,                     # (block, last block of its tower)
             'visual.transformer.resblocks.0.attn.in_proj_weight': (0, 2), 'visual.transformer.resblocks.0.mlp.c_fc.bias': (0, 2),
             'visual.transformer.resblocks.1.attn.in_proj_weight': (1, 2), 'visual.transformer.resblocks.2.mlp.c_fc.weight': (2, 2),
             'transformer.resblocks.0.mlp.c_fc.weight': (0, 1), 'transformer.resblocks.1.mlp.c_fc.weight': (1, 1)}
    at = lambda k: start+slope*depth[k][0]/depth[k][1] if depth[k] else start
    return np.concatenate([at(k)*v.numpy().ravel() for k, v in tau.items()])

def close(tau, flat): return np.allclose(tau.flat().double().numpy(), flat, rtol=1e-10, atol=1e-12)

@given(whole_taus, st.sampled_from((0., .1, .2, .25, .5, .75, .99, 1.)))
def test_ties_is_the_papers_loop(taus, keep): assert close(ties(taus, keep), ties_loop(taus, keep))

@given(experts, st.floats(0, 1))
def test_ties_on_real_numbers(taus, keep): assert close(ties(taus, keep), ties_loop(taus, keep))

@given(st.one_of(experts, whole_taus), st.sampled_from((0., .2, .4, .5, .6, 1.)))
def test_tall_masks_are_the_papers_loop(taus, lam):
    masks = tall_masks(taus, lam)
    assert all(list(m)==list(taus[0]) and all(v.dtype==torch.bool and v.shape==taus[0][k].shape for k, v in m.items()) for m in masks)
    assert [torch.cat([v.flatten() for v in m.values()]).tolist() for m in masks]==masks_loop(taus, [lam]*len(taus))

@given(experts, st.data())
def test_consensus_is_the_papers_loop(taus, data):
    lams = data.draw(st.lists(st.sampled_from((.2, .3, .4, .5, .6)), min_size=len(taus), max_size=len(taus)))
    agree = data.draw(st.integers(1, len(taus)))
    assert close(consensus(taus, lams, agree), consensus_loop(taus, lams, agree))
    assert close(consensus(taus, torch.tensor(lams, dtype=torch.float64).tolist(), agree), consensus_loop(taus, lams, agree))

@given(st.one_of(experts, whole_taus), st.floats(0, 1), st.floats(0, 1))
def test_breadcrumbs_is_the_loop(taus, density, gamma): assert close(breadcrumbs(taus, density, gamma), breadcrumbs_loop(taus, density, gamma))

@given(experts)
def test_model_stock_is_the_loop(taus): assert close(stock(taus), stock_loop(taus))

@given(experts, st.floats(-2, 2), st.one_of(st.none(), st.floats(-2, 2)))
def test_lines_is_the_formula(taus, slope, start):
    for tau in (task_arithmetic(taus), ties(taus), consensus(taus)): assert close(lines(tau, taus, slope, start), lines_loop(tau, taus, slope, start))

# TIES in detail

@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 99))
def test_the_number_of_entries_kept(p, keep, seed):
    tau = make_tau(seed, shapes={'w': (p,)})
    kept = (tau['w'].abs() >= trim_threshold(tau, keep)).sum().item()
    assert kept==min(p, int(keep*p)+1)

def test_the_threshold_spans_the_model_and_ties_stay():
    tau = TaskVector({'large': torch.tensor([9., 8, 7, 6]), 'small': torch.tensor([.1]*6)})
    assert ties([tau], .2)['small'].abs().max()==0 and (ties([tau], .2)['large']!=0).sum()==3
    flat = TaskVector({'w': torch.ones(10)})
    assert (ties([flat], .2)['w']==1).all()                                          # ten equal magnitudes: all reach it

def test_zero_signs():
    taus = [TaskVector({'w': torch.tensor(v)}) for v in ([2., 3., 1.], [-2., 1., 1.])]
    assert ties(taus, 1.)['w'].tolist()==[2., 2., 1.]                                # the total of signs is positive
    assert ties([-t for t in taus], 1.)['w'].tolist()==[-2., -2., -1.]
    taus = [TaskVector({'w': torch.tensor(v)}) for v in ([2., 3.], [-2., -3.])]
    assert ties(taus, 1.)['w'].tolist()==[-2., -3.]                                  # no majority either: counted as negative
    assert ties([TaskVector({'w': torch.zeros(4)})])['w'].abs().max()==0

def test_ties_counts_entries_without_a_change():
    "Entries with a zero task vector belong to P."
    w = torch.randn(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    alone, with_rest = TaskVector({'w': w}), TaskVector({'w': w, 'frozen': torch.zeros(100, dtype=torch.float64)})
    assert (ties([alone], .2)['w']!=0).sum()==21 and (ties([with_rest], .2)['w']!=0).sum()==41

# DARE

@given(st.floats(0, .95), st.integers(0, 2**40))
def test_dare_drops_or_rescales(drop, seed):
    tau = make_tau(1)
    got, ref = dare([tau], drop, seed).flat(), tau.flat()
    kept = got!=0
    assert torch.allclose(got[kept], ref[kept]/(1-drop), rtol=1e-12)
    if drop==0: assert kept.all()

def test_dare_is_its_own_random_numbers():
    taus = make_taus(3)
    torch.manual_seed(1); a = dare(taus); state = torch.get_rng_state()
    torch.manual_seed(2); b = dare(taus)
    assert torch.equal(a.flat(), b.flat()) and not torch.equal(a.flat(), dare(taus, seed=1).flat())
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())                                 # the global generator was not touched
    for dtype in DTYPES: assert torch.equal(dare([t.to(dtype) for t in taus[:1]]).flat()!=0, dare(taus[:1]).flat()!=0)

def test_dare_keeps_the_mean_and_the_share():
    tau = TaskVector({'w': torch.ones(200_000)})
    for drop in (.1, .5, .9):
        got = dare([tau], drop, seed=7)['w']
        assert (got==0).float().mean().item()==pytest.approx(drop, abs=.005) and got.mean().item()==pytest.approx(1, abs=.02)
    a, b = (dare([t])['w'] for t in (tau, 2*tau))
    both = dare([tau, 2*tau])['w']
    assert set(both.unique().tolist())=={0., 2., 4., 6.}                             # each expert has its own draws
    assert torch.equal(2*a, b)

# all methods: invariances

@each
@given(taus=experts, data=st.data())
def test_the_order_of_experts_does_not_matter(method, taus, data):
    if method is dare: return                                                        # draws go by position
    assert gap(method(data.draw(st.permutations(taus))).flat(), method(taus).flat()) < 1e-12

@each
@given(taus=experts, c=st.sampled_from((2., .25, 1024., 1/64)))
def test_methods_are_homogeneous(method, taus, c):
    assert torch.equal(method([c*t for t in taus]).flat(), (c*method(taus)).flat()) or gap(method([c*t for t in taus]).flat(), (c*method(taus)).flat()) < 1e-14

@each
@given(taus=experts)
def test_methods_are_odd(method, taus): assert gap(method([-t for t in taus]).flat(), -method(taus).flat()) < 1e-14

@each
@pytest.mark.parametrize('dtype', DTYPES)
def test_dtype_in_dtype_out(method, dtype):
    taus = make_taus(4, dtype)
    before = [t.map(lambda k, v: v.clone()) for t in taus]
    got = method(taus)
    assert isinstance(got, TaskVector) and list(got)==list(SHAPES)
    assert all(v.dtype==dtype and tuple(v.shape)==SHAPES[k] and v.isfinite().all() for k, v in got.items())
    exact = method([t.to(torch.float64) for t in taus])
    tol = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert gap(got.flat(), exact.flat()) < tol                                       # one rounding, at the end
    assert all(torch.equal(a[k], b[k]) for a, b in zip(taus, before) for k in a)     # inputs are left alone

@each
def test_mixed_dtypes_take_the_wider(method):
    taus = make_taus(3)
    mixed = [taus[0].to(torch.bfloat16), taus[1].to(torch.float32), taus[2].to(torch.float16)]
    assert all(v.dtype==torch.float32 for v in method(mixed).values())

@each
def test_the_order_of_names_does_not_matter(method):
    if method is dare: return                                                        # draws go by position
    taus = make_taus(3)
    turned = [TaskVector({k: t[k] for k in reversed(list(t))}) for t in taus]
    assert gap(method([taus[0], *turned[1:]]).flat(), method(taus).flat()) < 1e-12
    got = method(turned)
    assert all(torch.allclose(got[k], method(taus)[k]) for k in SHAPES)

def test_special_cases_agree():
    taus = make_taus(4)
    total = task_arithmetic(taus).flat()
    assert gap(average(taus).flat()*4, total) < 1e-15
    assert gap(ties(taus[:1], 1.).flat(), taus[0].flat()) < 1e-15
    assert gap(dare(taus, 0.).flat(), total) < 1e-15 and gap(breadcrumbs(taus, 1., 0.).flat(), total) < 1e-15
    assert breadcrumbs(taus, 0., 0.).norm()==0 and breadcrumbs(taus, 1., 1.).norm()==0
    assert gap(consensus(taus, 0., 4).flat(), total) < 1e-15                         # λ = 0: everybody claims everything
    assert gap(lines(average(taus), taus, 0.).flat(), average(taus).flat()) < 1e-12
    for m in (average, task_arithmetic, ties, dare, breadcrumbs): assert m(taus[:1]).norm()>0
    assert all(v.all() for v in tall_masks(taus[:1])[0].values())                    # alone, it claims all it changed

@given(experts)
def test_masks_shrink_as_lambda_grows(taus):
    a, b = tall_masks(taus, .2), tall_masks(taus, .6)
    assert all((y[k] <= x[k]).all() for x, y in zip(a, b) for k in y)

@given(experts)
def test_sizes_of_results(taus):
    n, total = len(taus), average(taus)
    assert ties(taus).flat().abs().max() <= max(t.flat().abs().max() for t in taus)
    assert lines(ties(taus), taus, 0.).norm(1)==pytest.approx(total.norm(1), rel=1e-9)
    assert all(lines_factors(SHAPES, .5, .2)[k] <= .7+1e-12 for k in SHAPES)

def test_breadcrumbs_counts_equal_magnitudes_out():
    rng = torch.Generator().manual_seed(0)
    for _ in range(100):                                                             # few values: equal ones at both edges, in numbers that may cancel
        w = torch.randint(-4, 5, (270,), generator=rng)*.5
        keep = w.abs().argsort(stable=True)[135:243]
        want = torch.zeros_like(w); want[keep] = w[keep]
        assert torch.equal(breadcrumbs([TaskVector({'w': w})], density=.4, gamma=.1)['w'], want)

def test_stock_ratio():
    w = torch.randn(50, dtype=torch.float64)
    assert stock_ratio([w, 2*w, 3*w]).item()==pytest.approx(1)
    assert stock_ratio([w, -w])==-1 and stock([make_tau(1), -make_tau(1)]).norm()==0   # opposite ones: an average of nothing
    assert stock_ratio([w*0, w*0])==0
    eye = torch.eye(3)
    assert stock_ratio(list(eye)).item()==pytest.approx(0, abs=1e-6)
    assert stock([zero, make_tau(1)]).norm()==0
    assert model_stock(make_taus(2), dict(zero) | {'buffer': torch.arange(3)}).norm()>0   # a base may hold more

def test_lines_depth_tower_by_tower():
    names = ['vision_model.encoder.layers.0.a', 'vision_model.encoder.layers.5.a', 'text_model.encoder.layers.2.a', 'text_model.encoder.layers.0.a', 'proj']
    assert list(lines_factors(names, .1, 1.).values())==pytest.approx([.1, 1.1, 1.1, .1, .1])
    names = ['encoder.block.1.layer.0.q', 'encoder.block.2.layer.1.q', 'decoder.block.4.layer.2.q', 'decoder.block.1.layer.0.q']
    assert list(lines_factors(names, 0., 1.).values())==pytest.approx([.5, 1., 1., .25])
    assert list(lines_factors(['h.0.w'], .3, 1.).values())==[.3]                     # a single block is the first one

# refusals

@each
@given(data=st.data())
def test_what_cannot_be_merged_is_refused(method, data):
    taus = make_taus(3)
    i = data.draw(st.integers(0, 2), label='which')
    key = data.draw(st.sampled_from(sorted(SHAPES)), label='key')
    bad = data.draw(st.sampled_from(('nan', 'inf', 'missing', 'extra', 'shape', 'same', 'dict', 'none', 'empty', 'one', 'hollow')), label='bad')
    t = dict(taus[i])
    if bad in ('nan', 'inf'): t[key] = torch.full_like(t[key], float(bad))
    elif bad=='missing': del t[key]
    elif bad=='extra': t['one.more'] = torch.ones(2)
    elif bad=='shape': t[key] = torch.zeros(7, *t[key].shape, dtype=torch.float64)
    taus[i] = {'same': taus[i-1], 'dict': t, 'none': None}.get(bad) if bad in ('same', 'dict', 'none') else TaskVector(t)
    if bad=='empty': taus = []
    if bad=='one': taus = taus[0]
    if bad=='hollow': taus = [TaskVector({})]
    with pytest.raises((ValueError, TypeError), match='taus|tau'): method(taus)

def test_one_expert_where_two_are_needed():
    for method in (stock, consensus):
        with pytest.raises(ValueError, match='at least 2'): method(make_taus(1))

outside = st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=1+1e-9), st.just(float('nan')), st.sampled_from((None, 'much', {}, 1j, True)))
calls = {'keep': ties, 'drop': dare, 'density': breadcrumbs, 'gamma': breadcrumbs, 'lam': consensus}

@given(st.sampled_from(sorted(calls)), outside)
def test_shares_outside_are_refused(name, value):
    with pytest.raises((ValueError, TypeError), match=name): calls[name](make_taus(2), **{name: value})
    if name=='lam':
        with pytest.raises((ValueError, TypeError), match=name): tall_masks(make_taus(2), lam=value)
        with pytest.raises((ValueError, TypeError), match=name): tall_masks(make_taus(2), lam=[.4, value])

@given(st.one_of(st.integers(max_value=-1), st.integers(min_value=2**63), st.sampled_from((None, 1.5, '0', True, [0]))))
def test_seeds_are_refused(seed):
    with pytest.raises((ValueError, TypeError), match='seed'): dare(make_taus(2), seed=seed)

@given(st.one_of(st.integers(max_value=0), st.integers(min_value=4), st.sampled_from((None, 1.5, '2', True, float('nan')))))
def test_agree_is_refused(agree):
    with pytest.raises((ValueError, TypeError), match='agree'): consensus(make_taus(3), agree=agree)

@pytest.mark.parametrize('lam', ([], [.4], [.4]*4, {}, ()))
def test_one_lambda_per_expert(lam):
    for fn in (tall_masks, consensus):
        with pytest.raises(ValueError, match='lam'): fn(make_taus(3), lam)

def test_drop_one_is_refused():
    with pytest.raises(ValueError, match='drop'): dare(make_taus(2), drop=1)

@given(st.sampled_from((None, 'steep', [1.], True, 1j, float('nan'), float('inf'))))
def test_lines_refuses(value):
    taus = make_taus(2)
    tau = task_arithmetic(taus)
    with pytest.raises((ValueError, TypeError), match='slope'): lines(tau, taus, slope=value)
    if value is not None:
        with pytest.raises((ValueError, TypeError), match='start'): lines(tau, taus, slope=.1, start=value)

def test_lines_refuses_a_tau_that_does_not_fit():
    taus = make_taus(2)
    tau = task_arithmetic(taus)
    for k in SHAPES:
        d = dict(tau)
        for bad in ({n: v for n, v in d.items() if n!=k}, d | {k: torch.zeros(9, 9)}, d | {k: torch.full_like(d[k], float('nan'))}):
            with pytest.raises(ValueError, match='tau') as e: lines(TaskVector(bad), taus, slope=.3)
            assert k in str(e.value)
    with pytest.raises(ValueError, match='more'): lines(TaskVector(dict(tau) | {'more': torch.zeros(1)}), taus, slope=.3)
    for bad in (None, dict(tau), [tau]):
        with pytest.raises(TypeError, match='tau'): lines(bad, taus, slope=.3)
    with pytest.raises(ValueError, match='zero'): lines(zero, taus, slope=.3)
    assert lines(zero, taus, slope=.3, start=.1).norm()==0

def test_model_stock_checks_its_base():
    taus = make_taus(2)
    for k in SHAPES:
        for bad in ({n: v for n, v in zero.items() if n!=k}, dict(zero) | {k: torch.zeros(9, 9)}):
            with pytest.raises(ValueError, match='base') as e: model_stock(taus, bad)
            assert k in str(e.value)
    for bad in (None, 'base.pt', [1], {k: 1. for k in SHAPES}):
        with pytest.raises((ValueError, TypeError), match='base'): model_stock(taus, bad)

# the search

@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 99))
def test_search_finds_the_smallest_best(grid, seed):
    rng = np.random.default_rng(seed)
    scores = {float(c): int(rng.integers(0, 4)) for c in grid}
    tried = []
    best, table = search(lambda c: tried.append(c) or c, lambda c: scores[c], grid)
    assert best==min(c for c in scores if scores[c]==max(scores.values()))
    assert sorted(tried)==sorted(scores)==table.coefficient.tolist() and table.score.tolist()==[scores[c] for c in sorted(scores)]
    assert isinstance(table, pd.DataFrame) and list(table.columns)==['coefficient', 'score']

@given(st.floats(.05, 3))
def test_search_extends_at_an_edge(peak):
    grid = (.5, .6, .7, .8)
    best, table = search(lambda c: c, lambda c: -abs(c-peak), grid, extend=True)
    steps = np.diff(table.coefficient)
    assert np.allclose(steps, .1) and len(table) <= 9 and table.coefficient.min() > 0
    if .1 < peak < 1.2: assert abs(best-peak) <= .05+1e-6
    assert len(search(lambda c: c, lambda c: -abs(c-peak), grid)[1])==4

def test_search_extends_a_geometric_grid_and_stops_at_zero():
    assert search(lambda c: c, lambda c: -abs(c-16), (1, 2, 4), extend=True)[0]==16
    best, table = search(lambda c: c, lambda c: -c, (1, 2, 4), extend=True)
    assert best==1/32 and len(table)==8
    assert search(lambda c: c, lambda c: -c, (.1, .2, .3), extend=True)[1].coefficient.min()==.1
    assert search(lambda c: c, lambda c: -c, (-.1, 0, .1), extend=True)[0]==pytest.approx(-.6)
    assert search(lambda c: c, lambda c: 1., (.5,), extend=True)[0]==.5

@pytest.mark.parametrize('grid', ((), [], None, 3, '0.1', [None], ['a'], [float('nan')], [float('inf'), 1], [True], [[.1]]))
def test_search_refuses_grids(grid):
    with pytest.raises((ValueError, TypeError), match='grid'): search(lambda c: c, lambda c: c, grid)

def test_search_refuses_nan_scores():
    with pytest.raises(ValueError, match='score'): search(lambda c: c, lambda c: float('nan'), [.1])

def test_search_shows_progress(capsys):
    search(lambda c: c, lambda c: c, [.1, .2], desc='alpha of TIES')
    assert 'alpha of TIES' in capsys.readouterr().err
    search(lambda c: c, lambda c: c, [.1, .2])
    assert capsys.readouterr().err==''

def test_choose_alpha_asks_the_validation_split():
    tau, base, seen = make_tau(1), dict(make_tau(2)), []
    class Pool:
        def __init__(self): self.base = base
        def evaluate(self, state, tasks, split='test'):
            alpha = ((state['logit_scale']-base['logit_scale'])/tau['logit_scale']).item()
            seen.append((tuple(tasks), split))
            rows = {t: dict(accuracy=alpha, normalised=-(alpha-.42)**2) for t in tasks}      # accuracy alone would say 1.0
            table = pd.DataFrame(rows).T
            table.loc['mean'] = table.mean()
            return table
    alpha, table = choose_alpha(Pool(), tau, ['a', 'b'])
    assert alpha==.4 and table.coefficient.tolist()==list(paper_grid)==[i/10 for i in range(1, 11)]
    assert set(seen)=={(('a', 'b'), 'val')}
    assert choose_alpha(Pool(), tau, ['a'], grid=[.1, .2], extend=True)[0]==pytest.approx(.4)

def test_sums_in_pieces(monkeypatch):
    from subspace_nb import merge
    ws = [torch.randn(3*2**18+5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    parts = in_pieces(len(ws[0]))
    assert [p.stop-p.start for p in parts]==[2**18]*3+[5] and in_pieces(0)==[slice(0, 0)]
    assert l1_norm(ws[0])==pytest.approx(ws[0].double().abs().sum().item(), rel=1e-12)
    assert agreement([w[p] for w in ws] for p in parts)==stock_ratio(ws)
    unit = [w.double()/w.double().norm() for w in ws]
    c = sum(unit[i]@unit[j] for i in range(3) for j in range(3) if i!=j)/6
    assert stock_ratio(ws).item()==pytest.approx((3*c/(1+2*c)).item(), rel=1e-9)

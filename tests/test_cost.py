"Counting matrices, the nonnegative fit, calibration and forecasts: oracles, invariances, refused inputs."
import importlib
import json
import sys
import time
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from conftest import make_tau
from subspace_nb.cost import (Calibration, Law, Method, best_of, calibrate, check_experts, check_method, decay, estimate, fit_power, methods, model_shapes, nonnegative_fit,
                              part_name, pieces, plan, random_experts, random_matrix, shapes_of, t5_shapes, terms, time_matrix, vit_shapes)
from subspace_nb.score import Results
from subspace_nb.tasks import TaskVector, block_index, in_block, row_slices

sides = st.sampled_from(['short', 'in', 'out', ''])


def rows_of(method, coefficients, sizes=((2, 64, 64), (2, 256, 64), (2, 64, 256), (4, 64, 64), (4, 128, 128), (8, 128, 512), (8, 512, 128), (3, 96, 32)), noise=0.):
    "Measurements that follow a law exactly, or nearly."
    rng = np.random.default_rng(0)
    times = [float(np.dot(terms(*s, methods[method].side), coefficients)*np.exp(noise*rng.standard_normal())) for s in sizes]
    return [dict(method=method, experts=n, out=o, inp=i, count=1, each=t, MiB=o*i*n/1e5) for (n, o, i), t in zip(sizes, times)]


def both(method, coefficients, **kw): return Calibration([*rows_of(method, coefficients, **kw), *rows_of('task_arithmetic', [1e-5, 1e-3])])


# ---- shapes and pieces

def test_models_have_the_published_sizes():
    count = lambda m: sum(o*i for o, i in model_shapes[m].values())
    assert count('ViT-B/32')==12*12*768**2 and count('ViT-L/14')==24*12*1024**2
    assert 6.7e9<count('T5-like, 7 billion')<7e9


def test_every_matrix_is_in_a_block_and_fused_attention_is_known_as_such():
    for shapes in (vit_shapes(64, 3), t5_shapes(64, 160, 2)):
        for k, s in shapes.items():
            assert in_block(k, torch.empty(s, device='meta')) and block_index(k) is not None
            assert len(row_slices(k, torch.empty(s, device='meta'), 'per_qkv'))==(3 if k.endswith('in_proj_weight') else 1)


@pytest.mark.parametrize('method', methods)
def test_pieces_hold_every_entry_once(method):
    for shapes in (*model_shapes.values(), {'a.blocks.0.w': (6, 4), 'b': (5,), 'c': (), 'text_projection': (8, 8), 'conv': (3, 2, 2)}):
        count, rest = pieces(shapes, method)
        assert sum(o*i*c for (o, i), c in count.items())+rest==sum(int(np.prod(s)) for s in shapes.values())
        assert all(c>0 for c in count.values()) and rest>=0


def test_pieces_follow_the_methods_own_rules():
    shapes = {'text_projection': (8, 8), 'visual.proj': (8, 4), 'visual.transformer.resblocks.0.attn.in_proj_weight': (12, 4), 'ln.bias': (4,)}
    assert dict(pieces(shapes, 'tsv_m')[0])=={(8, 4): 1, (12, 4): 1} and pieces(shapes, 'tsv_m')[1]==68
    assert dict(pieces(shapes, 'boosting')[0])=={(4, 4): 3} and pieces(shapes, 'boosting')[1]==100


def test_tensors_and_task_vectors_do_as_well_as_shapes():
    tau = make_tau(0)
    assert shapes_of(tau)==shapes_of(dict(tau))==shapes_of({k: tuple(w.shape) for k, w in tau.items()})
    assert pieces(tau, 'iso_c')==pieces(shapes_of(tau), 'iso_c')


@pytest.mark.parametrize('bad, error', [([], TypeError), ({}, ValueError), ({'a': (0, 3)}, ValueError), ({'a': (2.5, 3)}, ValueError), ({'a': (-1,)}, ValueError)])
def test_models_that_are_none(bad, error):
    with pytest.raises(error, match='model'): shapes_of(bad)


# ---- random experts and the clock

@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(1, 3))
def test_experts_have_the_shape_asked_for(out, inp, n, count):
    taus, xs = random_experts(n, out, inp, count, inputs='all')
    assert len(taus)==len(xs)==n and all(len(t)==count and {tuple(w.shape) for w in t.values()}=={(out, inp)} for t in taus)
    assert all(w.isfinite().all() for t in taus for w in t.values()) and all(x.shape[1]==inp for d in xs for x in d.values())
    assert [len(d) for d in xs]==n*[count] and not any(random_experts(n, out, inp, count)[1]) and bool(random_experts(n, out, inp, 1, 'long')[1][0])==(out!=inp)
    assert torch.equal(random_experts(n, out, inp, count)[0][-1][part_name(out, inp)], taus[-1][part_name(out, inp)])


def test_spectrum_falls_as_asked():
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    s = torch.linalg.svdvals(random_matrix((4096, 32), turn, 'power', torch.Generator().manual_seed(1)).double())
    assert torch.allclose(s/s[0], (decay(32)/decay(32)[0]).double(), rtol=.1)
    assert decay(10, 'ill')[-1]/decay(10, 'ill')[0]<2e-6


@pytest.mark.parametrize('method', methods)
def test_every_method_runs_on_every_form_of_matrix(method):
    for out, inp in ((48, 16), (16, 16), (64, 16), (16, 64)):
        r = time_matrix(method, 3, out, inp, repeats=1)
        assert r['each']>0 and r['MiB']>=0 and (r['method'], r['experts'], r['out'], r['inp'], r['count'])==(method, 3, out, inp, 1)


@pytest.fixture
def bench(monkeypatch):
    "A benchmark's module, by name."
    root, before = Path(__file__).parents[1], set(sys.modules)
    monkeypatch.syspath_prepend(root/'benchmarks'); monkeypatch.chdir(root)
    yield importlib.import_module
    for name in set(sys.modules)-before:
        if Path(getattr(sys.modules[name], '__file__', None) or '').parent==root/'benchmarks': del sys.modules[name]


@pytest.fixture(params=['esm', 'ties'])
def witness(request, monkeypatch):
    "A method that writes down where its inputs and the work are."
    places = []
    def run(taus, xs, device): places.append({str(device), *(str(w.device) for d in (*taus, *xs) for w in d.values())})
    monkeypatch.setitem(methods, request.param, Method(run, inputs=methods[request.param].inputs))
    return request.param, places


def test_inputs_lie_on_the_device_before_the_clock_starts(witness, bench):
    method, places = witness
    for device in ('meta', torch.device('meta'), 'cpu'):
        time_matrix(method, 2, 24, 8, device=device, repeats=1)
        assert places.pop()=={str(device)} and not places
    bench('cost').time_blocks(method, 2, 2, 8, torch.device('meta'))
    assert places and all(p=={'meta'} for p in places)


def test_experts_do_not_depend_on_the_device():
    taus, xs = random_experts(2, 24, 8, 2, inputs='long', device='meta')
    assert {w.device.type for d in (*taus, *xs) for w in d.values()}=={'meta'} and all(xs)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(random_experts(2, 24, 8)[0], random_experts(2, 24, 8, device='cpu')[0]) for k in a)


def test_the_benchmark_asks_by_default_for_the_rows_that_are_stored(bench):
    cost, elsewhere, stored = bench('cost'), bench('elsewhere'), Results('nbs/results/cost.json')
    envs = dict.fromkeys(('ours', 'mergekit', 'fusion-bench'), Path())
    wanted = [*(cost.key_of(j) for part in ('table', 'plain', 'law', 'large', 'blocks') for j in cost.jobs(part)), *elsewhere.jobs(envs, cost.sizes, cost.depth, cost.width)]
    assert not [key for key in wanted if not stored.find(**key)] and set(stored.meta['settings'])=={'threads', 'device', 'dtype', 'rows', 'repeats'}


def test_rows_on_the_same_matrices_follow_each_other(bench):
    cost = bench('cost')
    jobs = [j for part in ('table', 'plain', 'law', 'large', 'blocks') for j in cost.jobs(part)]
    todo = cost.in_order(dict.fromkeys(jobs))
    assert set(todo)==set(jobs) and len(todo)==len(set(jobs))
    of = [(j[2:], cost.taken(j[1], *j[3:])) for j in todo if j[0]!='blocks']
    assert sum(a!=b for a, b in zip(of, of[1:]))==len(set(of))-1
    assert {m for w, m, n, *_ in jobs if w=='ours' and n in cost.sizes}==set(methods) and {m for w, m, *_ in jobs if w=='plain'}=={m for m, how in methods.items() if how.side}-{'regmean'}


@pytest.mark.parametrize('method', ['boosting', 'iso_c', 'iso_cts', 'tsv_m', 'esm', 'higher_order_boosting', 'knots'])
def test_the_plain_way_is_the_same_merge(method, bench):
    cost = bench('cost')
    for out, inp in ((36, 24), (24, 36), (24, 24)):
        (taus, xs), k = random_experts(3, out, inp, 1, methods[method].inputs), part_name(out, inp)
        taus, xs = [t.to(torch.float64) for t in taus], [{k: x.double() for k, x in d.items()} for d in xs]
        want = cost.plain[method]([t[k] for t in taus], [d[k] for d in xs if k in d])
        got = methods[method].run(taus, xs, torch.device('cpu'))[k]
        assert (got-want).norm()<1e-3*want.norm()


def test_matrices_of_a_benchmark_are_made_once(bench):
    cost = bench('cost')
    taus, xs = cost.matrices('esm', 2, 24, 8, 1, torch.device('cpu'))
    want = random_experts(2, 24, 8, 1)[0]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(taus, want) for k in b) and [set(t) for t in taus]==[set(t) for t in want]==[set(d) for d in xs]
    assert cost.matrices('esm', 2, 24, 8, 1, torch.device('cpu'))[0][0][part_name(24, 8)].data_ptr()==taus[0][part_name(24, 8)].data_ptr()
    row = cost.time_ours('knots', 2, 24, 8, torch.device('cpu'))
    assert row['count']==1 and row['each']>0 and cost.at_once('boosting', 4096, 1024)==torch.get_num_threads() and cost.at_once('higher_order_boosting', 768, 3072)==1


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read there')
def test_merges_from_files_leave_rows_and_no_files(tmp_path, bench, monkeypatch):
    elsewhere = bench('elsewhere')
    envs = elsewhere.environments(tmp_path/'none', tmp_path/'none')
    assert set(envs)=={'ours'}
    todo = elsewhere.jobs(envs, (2,), 1, 16)
    assert [(key['method'], key['tool']) for key in todo]==[(m, 'ours') for m in elsewhere.tools]
    results = Results(tmp_path/'cost.json', threads=1)
    assert elsewhere.run_files(results, todo[:1], envs, 1, tmp_path) and len(results.rows)==1 and [f.name for f in tmp_path.iterdir() if f.is_dir()]==[]
    assert all(r['took']>0 and r['MiB']>0 and r['version'] and r['apart'] is None and r['way']=='files' for r in results.rows)
    assert not elsewhere.run_files(results, todo, envs, 1, tmp_path, lambda: True)


def test_best_of_stops_in_time():
    calls = []
    assert best_of(lambda: calls.append(1), repeats=3)[0]>=0 and len(calls)==3
    best_of(lambda: (calls.append(1), time.sleep(.02)), repeats=9, enough=.03)
    assert 4<=len(calls)<=5


@pytest.mark.parametrize('n, error', [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError), ('2', TypeError)])
def test_numbers_of_experts(n, error):
    with pytest.raises(error, match='n must'): check_experts(n)
    with pytest.raises(error, match='n must'): estimate(vit_shapes(64, 1), n, 'iso_c', both('iso_c', [1e-3, 0, 0, 0, 1., 0]))


# ---- the fit

@settings(max_examples=60)
@given(st.lists(st.floats(0, 5), min_size=3, max_size=3), st.integers(0, 10**6))
def test_fit_finds_the_coefficients_it_was_made_from(c, seed):
    a = np.random.default_rng(seed).uniform(.1, 1, (12, 3))
    if max(c)>1e-3: assert np.allclose(a@nonnegative_fit(a, a@np.array(c)), a@np.array(c), rtol=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 15))
def test_fit_is_optimal_among_nonnegative(seed, terms, rows):
    rng = np.random.default_rng(seed)
    a, y = rng.uniform(0, 1, (rows, terms)), rng.uniform(.1, 1, rows)
    c = nonnegative_fit(a, y)
    loss = lambda c: np.square(a@c/y-1).sum()
    assert (c>=0).all()
    for _ in range(30): assert loss(c)<=loss(np.maximum(0, c+rng.normal(0, .1, terms)))+1e-9
    grad = (a/y[:, None]).T@(a@c/y-1)                                        # Karush–Kuhn–Tucker
    assert (grad>=-1e-6).all() and np.abs(grad*c).max()<1e-6


def test_fit_does_not_depend_on_units():
    rng = np.random.default_rng(3)
    a, y = rng.uniform(0, 1, (10, 4)), rng.uniform(.1, 1, 10)
    assert np.allclose(nonnegative_fit(a*[1e-6, 1, 1e3, 1], 50*y), 50*nonnegative_fit(a, y)/[1e-6, 1, 1e3, 1])


@pytest.mark.parametrize('a, y', [(np.ones((3, 2)), np.ones(2)), (np.ones(3), np.ones(3)), (np.ones((2, 2)), np.array([1., 0])), (np.ones((0, 2)), np.ones(0))])
def test_fits_that_cannot_be(a, y):
    with pytest.raises(ValueError): nonnegative_fit(a, y)


@given(st.floats(.2, 3.5), st.floats(1e-6, 1e3))
def test_power_of_an_exact_power(p, factor):
    x = np.array([96, 192, 384, 768.])
    f = fit_power(x, factor*x**p)
    assert abs(f.exponent-p)<1e-9 and abs(f.factor/factor-1)<1e-6 and f.error<1e-6 and abs(f(100)/(factor*100**p)-1)<1e-6


def test_error_of_a_power_covers_the_truth():
    rng, inside = np.random.default_rng(0), 0
    x = np.geomspace(10, 1000, 12)
    for _ in range(300):
        f = fit_power(x, x**2.5*np.exp(.1*rng.standard_normal(12)))
        inside += abs(f.exponent-2.5)<2.23*f.error
    assert .9<inside/300<.99


@pytest.mark.parametrize('x, y', [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, -2, 3]), ([0, 2, 3], [1, 2, 3])])
def test_powers_that_cannot_be(x, y):
    with pytest.raises(ValueError): fit_power(x, y)


# ---- calibration and forecast

@pytest.mark.parametrize('method', [m for m in methods if methods[m].side])
def test_forecast_of_a_machine_that_follows_the_law(method):
    c, shapes = [2e-4, 1e-3, 2e-3, 1e-3, .5, .3], vit_shapes(128, 5)
    got, count = estimate(shapes, 6, method, both(method, c)), pieces(shapes, method)[0]
    assert got.seconds==pytest.approx(sum(k*np.dot(terms(6, *s, methods[method].side), c) for s, k in count.items()), rel=1e-5)
    assert not got.parts.measured.any() and got.parts.matrices.sum()==sum(count.values())


def test_depth_multiplies_and_measured_rows_count():
    cal = both('tsv_m', [1e-4, 0, 1e-3, 1e-3, .1, .5])
    one, ten = estimate(vit_shapes(128, 1), 4, 'tsv_m', cal), estimate(vit_shapes(128, 10), 4, 'tsv_m', cal)
    assert ten.seconds==pytest.approx(10*one.seconds)
    assert one.parts.set_index(['out', 'inp']).measured[128, 128] and not one.parts.set_index(['out', 'inp']).measured[384, 128]
    cal.rows.append(dict(method='tsv_m', experts=4, out=384, inp=128, count=1, each=123., MiB=1.))
    assert estimate(vit_shapes(128, 1), 4, 'tsv_m', cal).seconds>123


def test_forecast_says_when_it_goes_beyond():
    cal = both('iso_c', [1e-4, 0, 1e-3, 0, .1, 0])
    assert not estimate(vit_shapes(128, 1), 8, 'iso_c', cal).beyond
    assert estimate(vit_shapes(129, 1), 8, 'iso_c', cal).beyond and estimate(vit_shapes(128, 1), 9, 'iso_c', cal).beyond
    assert 'beyond' in repr(estimate(vit_shapes(256, 1), 8, 'iso_c', cal)) and 'Calibration(' in repr(cal)


def test_more_of_anything_takes_longer():
    cal = both('esm', [1e-4, 1e-4, 1e-3, 1e-3, .1, .1], noise=.02)
    t = lambda w, b, n: estimate(vit_shapes(w, b), n, 'esm', cal).seconds
    assert t(64, 2, 4)<t(128, 2, 4)<t(128, 3, 4)<t(128, 3, 8)


def test_entrywise_methods_need_no_matrices():
    cal = Calibration(rows_of('ties', [1e-5, 2e-3]))
    got = estimate({'a': (1000,), 'b': (10, 10, 10)}, 3, 'ties', cal)
    assert got.seconds==pytest.approx(1e-5+3*2000e-6*2e-3, rel=1e-3) and not got.beyond and got.MiB>0 and got.measured==0


def test_leftover_entries_are_summed():
    cal = both('boosting', [1e-4, 0, 1e-3, 0, .1, 0])
    small, large = vit_shapes(64, 1), vit_shapes(64, 1) | {'token_embedding': (1000, 1000)}
    assert estimate(large, 2, 'boosting', cal).seconds-estimate(small, 2, 'boosting', cal).seconds==pytest.approx(1e-5+2e-3, rel=.02)


def test_saved_and_loaded(tmp_path):
    cal = both('iso_c', [1e-4, 0, 1e-3, 0, .1, 0]); cal.meta = dict(device='here')
    cal.save(tmp_path/'c.json'); again = Calibration.load(tmp_path/'c.json')
    assert again.rows==cal.rows and again.meta==cal.meta and json.loads((tmp_path/'c.json').read_text())['meta']['device']=='here'
    assert estimate(vit_shapes(96, 2), 5, 'iso_c', again).seconds==estimate(vit_shapes(96, 2), 5, 'iso_c', cal).seconds


def test_what_stays_in_memory_is_forecast():
    rows = [dict(r, method=m) for m in ('knots', 'iso_cts') for r in rows_of('iso_c', [1e-4, 0, 1e-3, 0, .1, 0])]
    cal = Calibration([*rows, *rows_of('task_arithmetic', [1e-5, 1e-3])])
    mib = lambda blocks, n: estimate(vit_shapes(64, blocks), n, 'knots', cal).MiB-estimate(vit_shapes(64, blocks), n, 'iso_cts', cal).MiB
    entries = 12*64**2
    assert mib(3, 5)-mib(3, 4)==pytest.approx(4*3*entries/2**20, rel=1e-6) and mib(3, 5)==pytest.approx((12+20)*3*entries/2**20, rel=1e-6)


def test_calibration_of_this_machine():
    cal = calibrate(['iso_c', 'ties'], widths=(16, 32), experts=(2, 3))
    assert {r['method'] for r in cal.rows}=={'task_arithmetic', 'iso_c', 'ties'} and len(cal.rows)==3*2*2*3
    table = plan(vit_shapes(32, 2), 3, cal)
    assert list(table.columns)==['seconds', 'MiB', 'measured', 'beyond'] and (table.seconds>0).all() and list(table.seconds)==sorted(table.seconds)
    law = cal.law('iso_c')
    assert isinstance(law, Law) and law.largest==(3, 32) and (law.coefficients>=0).all() and cal.law('iso_c') is law and law.beyond(4, 8, 8) and not law.beyond(3, 8, 99)
    assert all(abs(law(r['experts'], r['out'], r['inp'])/r['each']-1)<1e-9 for r in cal.of('iso_c'))


def test_one_method_may_be_named_alone():
    cal = both('iso_c', [1e-4, 0, 1e-3, 0, .1, 0])
    assert plan(vit_shapes(64, 1), 2, cal, 'iso_c').equals(plan(vit_shapes(64, 1), 2, cal, ['iso_c'])) and len(plan(vit_shapes(64, 1), 2, cal))==2
    with pytest.raises(ValueError, match="not 'magic'"): plan(vit_shapes(64, 1), 2, cal, 'magic')


def test_what_is_refused():
    with pytest.raises(ValueError, match='rows is empty'): Calibration([])
    with pytest.raises(ValueError, match='method must be one of'): check_method('svd')
    with pytest.raises(ValueError, match='method must be one of'): calibrate(['svd'])
    with pytest.raises(ValueError, match='not calibrated'): estimate(vit_shapes(64, 1), 2, 'esm', both('iso_c', [1e-4, 0, 1e-3, 0, .1, 0]))


@pytest.mark.parametrize('method', ['boosting', 'tsv_m', 'task_arithmetic'])
def test_what_is_measured_is_the_method_itself(method):
    taus, xs = random_experts(3, 32, 16, 2)
    from subspace_nb import boost, merge, rivals
    want = {'boosting': lambda t: boost.subspace_boosting(merge.task_arithmetic(t)), 'tsv_m': rivals.tsv_m, 'task_arithmetic': merge.task_arithmetic}[method](taus)
    got = methods[method].run(taus, xs, torch.device('cpu'))
    assert isinstance(got, TaskVector) and all(torch.equal(got[k], want[k]) for k in want)

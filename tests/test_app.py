"""The playground's engine against the functions of the chapters, what it keeps, and what the widget shows at each moment."""
import json
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors import safe_open
from traitlets import TraitError

from subspace_nb import app
from subspace_nb.app import Engine, Factors, GridSlider, Latest, Playground, Settings, code, higher_order, methods
from subspace_nb.boost import boost, subspace_boosting
from subspace_nb.experts import Pool, read_state
from subspace_nb.hogsvd import boosted_merge, higher_order_boosting
from subspace_nb.merge import average, consensus, lines, task_arithmetic
from subspace_nb.spectra import lift, singular_values, stable_rank
from subspace_nb.tasks import TaskVector
from conftest import gap, make_taus

SHAPES = {'visual.conv1.weight': (3, 2, 2), 'visual.transformer.resblocks.0.attn.in_proj_weight': (192, 16), 'visual.transformer.resblocks.0.mlp.c_fc.weight': (32, 16),
          'visual.transformer.resblocks.1.attn.in_proj_weight': (192, 16), 'visual.transformer.resblocks.1.mlp.c_proj.weight': (16, 32), 'visual.ln.bias': (16,)}
NAMES = tuple('abcdef')

def small_pool(evaluate=None):
    base, *taus = make_taus(7, torch.float32, shapes=SHAPES)
    if evaluate is None:
        evaluate = lambda state, task, split: float(torch.sigmoid(sum((state[k]*taus[NAMES.index(task)][k]).sum() for k in base)/50))
    return Pool.from_files(dict(base), {n: t.apply(dict(base)) for n, t in zip(NAMES, taus)}, evaluate)

def worst(a, b): return max(gap(a[k], b[k]) for k in b)

# -- settings

@pytest.mark.parametrize('wrong, name', [(dict(experts=()), 'experts'), (dict(experts=('a', 'a')), 'experts'), (dict(method='mean'), 'method'), (dict(beta=-.1), 'beta'), (dict(beta=2), 'beta'),
    (dict(attention_beta=1.1), 'attention_beta'), (dict(attention='heads'), 'attention'), (dict(alpha=float('inf')), 'alpha'), (dict(slope=float('nan')), 'slope'),
    (dict(experts=('a',), method='Consensus'), 'experts'), (dict(experts=('a',), method=higher_order), 'experts'), (dict(method=higher_order, attention_beta=.1), 'attention_beta')])
def test_settings_refuse(wrong, name):
    with pytest.raises(ValueError, match=name): Settings(**{'experts': ('a', 'b')} | wrong)

@pytest.mark.parametrize('name', ['beta', 'alpha', 'slope'])
def test_settings_refuse_what_is_no_number(name):
    with pytest.raises(TypeError, match=name): Settings(('a', 'b'), **{name: 'high'})

# -- factors

@given(st.tuples(st.integers(1, 12), st.integers(1, 12)), st.integers(0, 99), st.floats(0, 1))
def test_factors_boost_as_boost_does(shape, seed, beta):
    dw = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    f = Factors.of(dw)
    assert gap(f.matrix(beta), boost(dw, beta))<2e-5
    assert gap(f.matrix(None), dw)<1e-5
    assert abs(f.stable_rank(beta)-float(stable_rank(f.matrix(beta))))<1e-3
    assert f.lifted(beta)[f.cutoff(beta)+1:].numel()==0 or torch.allclose(f.lifted(beta)[f.cutoff(beta)+1:], f.s[f.cutoff(beta)])

def test_null_directions_stay_at_zero():
    dw = torch.randn(24, 3)@torch.randn(3, 16)
    f = Factors.of(dw)
    assert int(f.null.sum())==13 and gap(f.matrix(0.), boost(dw, 0.))<1e-4
    assert abs(f.stable_rank(0.)-3)<1e-3

def test_a_zero_matrix_has_no_rank():
    f = Factors.of(torch.zeros(4, 3))
    assert f.stable_rank(0.)==0 and not f.matrix(0.).any()

@pytest.mark.parametrize('shape', [(20, 12), (12, 12), (6, 12)])
@pytest.mark.parametrize('beta', [0., .3, 1.])
def test_shared_factors_merge_as_algorithm_2_does(shape, beta):
    dws = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5))
    f = Factors.shared(dws)
    assert gap(f.matrix(beta), boosted_merge(dws, beta))<1e-4
    assert abs(f.stable_rank(beta)-float(stable_rank(boosted_merge(dws, beta))))<1e-2

def test_shared_factors_without_experts_that_changed_nothing():
    dws = torch.randn(3, 8, 6); dws[1] = 0
    assert gap(Factors.shared(dws).matrix(.2), boosted_merge(dws[[0, 2]], .2))<1e-4
    dws[2] = 0
    assert gap(Factors.shared(dws).matrix(.2), boost(dws[0], .2))<1e-4
    assert not Factors.shared(torch.zeros(2, 8, 6)).matrix(.2).any()

# -- the engine

@pytest.mark.parametrize('attention', ['full_attn', 'per_qkv'])
@pytest.mark.parametrize('method, merge', [('average', average), ('TA', task_arithmetic), ('Consensus', consensus)])
def test_engine_merges_and_boosts_as_the_chapters_do(method, merge, attention):
    pool = small_pool(); engine = Engine(pool)
    taus = pool.task_vectors(['a', 'c', 'd'])
    for beta, attention_beta in ((0., None), (.3, None), (.3, .05), (1., 0.)):
        s = Settings(('a', 'c', 'd'), method, beta, attention, attention_beta, .5)
        ref = subspace_boosting(merge(taus), beta, attention, attention_beta)
        assert worst(engine.tau(s), ref)<2e-5
        assert worst(engine.state(s), ref.apply(pool.base, .5))<1e-5
        assert worst(engine.state(Settings(('a', 'c', 'd'), method, beta, attention, attention_beta, 1., .7)), lines(ref, taus, .7).apply(pool.base))<1e-5

def test_engine_without_boosting_only_merges():
    pool = small_pool(); s = Settings(NAMES, beta=None, attention_beta=.2)
    assert worst(Engine(pool).tau(s), task_arithmetic(pool.task_vectors()))<1e-6

def test_engine_merges_by_higher_order_boosting():
    pool = small_pool(); engine = Engine(pool)
    for beta in (0., .2): assert worst(engine.tau(Settings(('a', 'b', 'c'), higher_order, beta)), higher_order_boosting(pool.task_vectors(3), beta))<1e-4
    assert worst(engine.tau(Settings(('a', 'b', 'c'), higher_order, None)), higher_order_boosting(pool.task_vectors(3), 1.))<1e-4

@given(st.lists(st.sets(st.sampled_from(NAMES), min_size=1), min_size=1, max_size=8))
def test_sums_do_not_depend_on_the_way_there(way):
    engine = Engine(pool := POOL)
    for some in way:
        some = tuple(n for n in NAMES if n in some)
        assert worst(engine.total(some), task_arithmetic(pool.task_vectors(list(some))))<1e-5

def test_ticking_an_expert_reads_only_that_expert(monkeypatch):
    engine, read = Engine(POOL), []
    engine.total(NAMES[:4])
    monkeypatch.setattr(engine, 'taus', lambda names: read.extend(names) or POOL.task_vectors(list(names)))
    engine.total(NAMES[:5])
    assert set(read)=={'e', 'a'}                              # 'a' for names and shapes
    read.clear(); engine.total(NAMES[1:5])
    assert set(read)=={'a', 'b'}

def test_a_new_beta_decomposes_nothing(monkeypatch):
    engine = Engine(POOL); s = Settings(NAMES[:3])
    engine.factors(s)
    monkeypatch.setattr(app, 'svd', None)
    for beta in (0., .1, .5): assert len(engine.ranks(Settings(NAMES[:3], beta=beta)))==len(engine.labels('per_qkv'))
    assert engine.ready(Settings(NAMES[:3], beta=.9)) and not engine.ready(Settings(NAMES[:2]))

def test_spectrum_is_that_of_the_matrix():
    engine = Engine(POOL); label = 'visual.transformer.resblocks.1.attn.in_proj_weight[k]'
    before, after, cutoff = engine.spectrum(Settings(NAMES, beta=.3), label)
    s = singular_values(task_arithmetic(POOL.task_vectors())[label[:-3]][64:128])
    assert torch.allclose(before, s, rtol=1e-4) and torch.allclose(after, lift(s, .3), rtol=1e-4)
    assert torch.allclose(after[cutoff:], before[cutoff].expand(len(s)-cutoff))

def test_validation_chooses_the_coefficient():
    tried = []
    target = lambda state, task, split: float(1/(1+abs((state['visual.ln.bias']-base['visual.ln.bias']).norm()-2)))
    pool = small_pool(target); base = pool.base
    engine = Engine(pool)
    s = engine.settle(Settings(NAMES[:3], alpha=None), told=tried.append)
    best = max(tried, key=lambda c: target(engine.state(Settings(NAMES[:3], alpha=c)), 'a', 'val'))
    assert s.alpha==best and len(tried)>3 and engine.fixed(Settings(NAMES[:3], alpha=None))==s
    tried.clear(); engine.settle(Settings(NAMES[:3], alpha=None), told=tried.append)
    assert not tried                                          # remembered
    with pytest.raises(ValueError, match='alpha'): engine.state(Settings(NAMES[:3], alpha=None))

def test_what_is_kept_is_there_while_something_else_is_merged(monkeypatch):
    engine, going, go_on = Engine(POOL), threading.Event(), threading.Event()
    kept = engine.factors(Settings(NAMES[:3]))
    monkeypatch.setitem(app.merges, 'TIES', lambda taus: (going.set(), go_on.wait(20), taus[0])[-1])
    other = threading.Thread(target=lambda: engine.factors(Settings(NAMES[:3], 'TIES'))); other.start()
    assert going.wait(5)
    start = time.monotonic()
    assert engine.factors(Settings(NAMES[:3])) is kept and engine.merged(Settings(NAMES[:3])) is not None
    assert time.monotonic()-start<5 and not engine.ready(Settings(NAMES[:3], 'TIES'))
    go_on.set(); other.join(20)
    assert engine.ready(Settings(NAMES[:3], 'TIES'))

@given(st.lists(st.sampled_from('abcd'), max_size=12))
def test_the_values_used_last_are_kept(order):
    engine, made = Engine(POOL, keep=2), []
    for k in order: assert engine._keep(engine._factors, k, lambda: (made.append(k), k)[1])==k
    last = list(dict.fromkeys(reversed(order)))[:2]
    assert list(engine._factors)==last[::-1]

def test_a_stopped_measurement_stops():
    with pytest.raises(app.Stopped): list(Engine(POOL).measure(NAMES, POOL.base, stopped=lambda: True))

def test_suggestions_are_in_the_pools_order():
    engine = Engine(POOL)
    some = engine.suggest(3)
    assert len(set(some))==3 and list(some)==sorted(some)
    assert engine.alignment() is engine.alignment()

@pytest.mark.parametrize('method', [m for m in methods if m not in ('ESM', 'TSV-M', 'Iso-CTS')])
@pytest.mark.parametrize('options', [dict(), dict(beta=.01), dict(beta=None), dict(beta=.2, slope=.3), dict(beta=.1, attention='full_attn', experts=('a', 'd', 'f')), dict(experts=NAMES[:3], alpha=1.3)])
def test_code_reproduces_the_weights(method, options):
    s = Settings(**dict(experts=NAMES, method=method) | options)
    run = {}
    text = code(s, POOL.tasks)
    exec(text.replace('from subspace_nb.experts import Pool', '').replace('Pool.embedded()', 'POOL'), run | dict(POOL=POOL), run)
    assert worst(run['state'], Engine(POOL).state(s))<1e-4
    assert max(map(len, text.splitlines()))<150

# -- newer work overtakes

def test_only_the_newest_job_runs():
    ran, done, latest = [], threading.Event(), Latest(.02)
    for i in range(30): latest.submit(lambda stopped, i=i: (ran.append(i), done.set()))
    assert done.wait(5) and ran==[29]

def test_a_running_job_hears_that_it_was_overtaken():
    latest, heard, started, done = Latest(0.), [], threading.Event(), threading.Event()
    def long(stopped):
        started.set()
        while not stopped(): time.sleep(.002)
        heard.append('stopped')
    latest.submit(long); assert started.wait(5)
    latest.submit(lambda stopped: (heard.append('next'), done.set()))
    assert done.wait(5) and heard==['stopped', 'next']

def test_nothing_runs_after_a_cancelled_job():
    ran, latest = [], Latest(.02)
    latest.submit(lambda stopped: ran.append(1)); latest.submit(None); time.sleep(.1)
    assert not ran

# -- the widget

def test_a_slider_over_uneven_values():
    g = GridSlider('β', (0., .01, .02, .5, 1.), .02, 0., 'threshold')
    assert g.slider.value==2 and g.switch.value and g.number.value=='0.02'
    g.slider.value = 4; assert g.value==1.
    g.value = .3; assert g.slider.value==3 and g.value==.3     # a value between two steps is kept
    g.switch.value = False; assert g.value is None and g.number.value=='off'
    g.switch.value = True; assert g.value==.3
    g.number.value = '0.015'; assert g.value==.015
    for text in ('much', 'nan', '-inf', '1e999', ''): g.number.value = text; assert g.value==.015 and g.number.value=='0.015'
    assert g.slider.description=='β' and g.number.description.startswith('β')

@pytest.fixture(scope='module')
def play():
    return Playground(POOL, 4).wait(30)

@pytest.fixture(autouse=True)
def back(request):
    yield
    if 'play' in request.fixturenames: request.getfixturevalue('play').reset()

def test_shown_is_what_the_functions_compute(play):
    play.beta, play.alpha, play.layer = .2, .7, 'visual.transformer.resblocks.0.mlp.c_fc.weight'
    now = play.wait(30).shown()
    tau = task_arithmetic(POOL.task_vectors(4)); boosted = subspace_boosting(tau, .2)
    assert torch.allclose(now['spectrum_before'], singular_values(tau[play.layer]), rtol=1e-4)
    assert torch.allclose(now['spectrum_after'], singular_values(boosted[play.layer]), rtol=1e-4)
    ref = POOL.evaluate(boosted.apply(POOL.base, .7), list(NAMES[:4]))
    assert np.allclose(now['accuracy'].to_numpy(), ref.to_numpy(), atol=1e-5)
    assert now['settings']['beta']==.2 and now['error'] is None and not now['busy']
    assert f"{ref.loc['mean', 'normalised']:.2%}" in play._headline.value

def test_nothing_older_than_the_settings_is_on_screen(play):
    play.wait(30)
    play.beta = .4
    now = play.shown()
    assert now['accuracy'] is None and play._accuracy.stale and now['busy']
    assert now['spectrum_after'] is not None and not play._spectrum.stale     # from the cache, at once
    play.experts = list(NAMES[2:])
    assert play.shown()['stable_rank'] is None and play._spectrum.stale and play._ranks.stale

def test_late_answers_are_dropped(play):
    play.wait(30)
    old = play._number, 'accuracy', (play.settings(), play.shown()['accuracy']*0, 0, {})
    play.beta = .6
    play._inbox.put(old)
    now = play.wait(30).shown()
    assert now['accuracy'].normalised.min()>0 and now['settings']['beta']==.6

def test_many_quick_changes_end_with_the_last(play):
    for i in range(8): play.beta = (i%10)/10; play.experts = list(NAMES[:2+i%4])
    now = play.wait(30).shown()
    assert now['settings']['beta']==.7 and now['settings']['experts']==NAMES[:5]
    ref = POOL.evaluate(subspace_boosting(task_arithmetic(POOL.task_vectors(5)), .7).apply(POOL.base, play.alpha), 5)
    assert np.allclose(now['accuracy'].to_numpy(), ref.to_numpy(), atol=1e-5)

def test_an_invalid_combination_is_said_on_screen(play):
    play.experts, play.method = ['a'], 'Consensus'
    now = play.shown()
    assert 'experts' in now['error'] and 'two at least' in play._error.value and not play.busy
    assert now['accuracy'] is None and now['spectrum_before'] is None and play._spectrum.stale
    panels = play._spectrum, play._ranks, play._alignment, play._accuracy, play._pictures
    assert all('pg-empty' in p._dom_classes for p in panels) and play._code.value=='' and 'not computed' in play._headline.value
    play._other_images_button.click()
    assert play.error==now['error'] and 'two at least' in play._error.value       # still why nothing is shown
    play.method = 'TA'
    assert play.error is None and 'pg-empty' not in play._accuracy._dom_classes    # on its way
    assert play.wait(30).shown()['error'] is None and not play._accuracy.stale and 'pg-empty' not in play._spectrum._dom_classes
    assert 'pg-empty' in play._alignment._dom_classes                              # of one expert

def wait_until(so, seconds=20):
    end = time.monotonic()+seconds
    while not so(): assert time.monotonic()<end; time.sleep(.02)

def test_the_alignment_is_that_of_the_ticked(play):
    play.wait(30); aligned = lambda: play.shown() and not play._alignment.stale
    wait_until(aligned)
    play.experts = ['a']; assert play._alignment.stale
    play.experts = list(NAMES[:4]); assert aligned()                               # the same as before
    p = Playground(POOL, 4, method='ESM').wait(30)                                 # no model, yet experts to compare
    wait_until(lambda: p.shown() and not p._alignment.stale)

def test_the_code_is_that_of_the_settings_at_every_moment(play):
    play.wait(30)
    play.beta = .3; assert play.busy and 'beta=0.3' in play._code.value
    play.alpha = 'auto'; assert play.busy and play._code.value==''                 # validation has not chosen yet
    play.wait(60); assert play._code.value==play.code()
    play.beta = .2; play.beta = .3; assert play._code.value==play.code()           # it has, for these

def test_an_error_in_the_background_is_said_on_screen(play, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError('the disk is full')
    monkeypatch.setattr(play.engine, 'measure', broken)
    play.beta = .35
    assert 'the disk is full' in play.wait(30).shown()['error'] and 'the disk is full' in play._error.value

def test_more_experts_than_rows_is_said_on_screen():
    p = Playground(POOL, 4, method='ESM').wait(30)
    assert 'ESM' in p.error and p.shown()['accuracy'] is None

@pytest.mark.parametrize('name, value, error', [('beta', 1.5, ValueError), ('attention_beta', -1., ValueError), ('method', 'mean', TraitError), ('attention', 'half', TraitError),
    ('alpha', 'best', TraitError), ('alpha', float('nan'), ValueError), ('alpha', -float('inf'), ValueError), ('slope', float('nan'), ValueError), ('experts', ['z'], ValueError), ('layer', 'visual.ln.bias', ValueError)])
def test_a_trait_refuses_what_it_cannot_be(play, name, value, error):
    before = getattr(play, name)
    with pytest.raises(error, match=name): setattr(play, name, value)
    assert getattr(play, name)==before
    with pytest.raises(TypeError, match='gamma'): Playground(POOL, 2, gamma=1)

def test_controls_and_traits_follow_each_other(play):
    heard = []
    play.observe(lambda change: heard.append(change.new), 'beta')
    play._beta.slider.value = 15; assert play.beta==.02 and heard==[.02]
    play.beta = .5; assert app.betas[play._beta.slider.value]==.5
    play._ticks['f'].value = True; assert play.experts==['a', 'b', 'c', 'd', 'f']
    play.experts = ['c', 'b']; assert play.experts==['b', 'c'] and [t for t, tick in play._ticks.items() if tick.value]==['b', 'c']
    play._alpha.switch.value = True; assert play.alpha=='auto'
    play.alpha = .9; assert not play._alpha.switch.value and play._alpha.number.value=='0.9'
    play.attention = 'full_attn'; assert play._attention.value=='full_attn' and play.layer in play.engine.labels('full_attn')
    play._block.value = 1; assert '.1.' in play.layer
    play.method = 'Iso-C'; assert play._method.value=='Iso-C'

def test_the_layer_survives_another_cut(play):
    play.layer = 'visual.transformer.resblocks.0.attn.in_proj_weight[v]'
    play.attention = 'full_attn'
    assert play.layer=='visual.transformer.resblocks.0.attn.in_proj_weight'
    assert len(play.wait(30).shown()['spectrum_before'])==16

def test_auto_shows_what_validation_chose(play):
    play.alpha = 'auto'
    now = play.wait(60).shown()
    assert now['settings']['alpha'] in app.coefficients and play.alpha=='auto' and play._alpha.number.value==f"{now['settings']['alpha']:.4g}"
    assert f"{now['settings']['alpha']}" in play.code()

def test_history_goes_back(play):
    play.beta = .123; play.wait(30)
    play.beta = .456; play.method = 'average'; play.wait(30)
    at = next(i for i, h in enumerate(play._order) if h['settings'].beta==.123)
    play._tried.value = at
    assert play.beta==.123 and play.method=='TA'
    assert play.wait(30).shown()['settings']['beta']==.123
    for _ in range(2):                                            # the same line again, and again when nothing new was tried
        play.beta = .456; play.wait(30)
        play._tried.value = next(i for i, h in enumerate(play._order) if h['settings'].beta==.123)
        assert play.beta==.123
    play.wait(30)
    assert len({h['settings'] for h in play.history})==len(play.history)

def test_pinning_compares_two_settings(play):
    play.wait(30); play.pin()
    kept = play.pinned['accuracy']
    assert play.error is None
    play.beta = .7; play.wait(30)
    assert play.pinned['accuracy'] is kept and play.pinned['settled'].beta==0. and 'A: ' in play._headline.value
    play.pin(); assert play.pinned is None and 'A: ' not in play._headline.value

def test_unpinning_computes_nothing(play, monkeypatch):
    play.wait(30); play.pin()
    go_on = threading.Event()
    def ties(taus): go_on.wait(20); return taus[0]
    monkeypatch.setitem(app.merges, 'TIES', ties)
    play.method = 'TIES'
    start = time.monotonic(); play.pin()
    assert play.pinned is None and time.monotonic()-start<5 and play.busy and play.error is None
    go_on.set(); play.wait(30)
    play.pin(); play.experts = []; play.pin()
    assert play.pinned is None and 'none is ticked' in play.error and play._spectrum.stale
    with pytest.raises(ValueError, match='pin'): play.pin()

def test_saving_writes_weights_and_settings(play, tmp_path):
    play.beta = .3; play.wait(30)
    path = play.save(tmp_path/'m.safetensors')
    assert worst(read_state(path), subspace_boosting(task_arithmetic(POOL.task_vectors(4)), .3).apply(POOL.base, play.alpha))<1e-5
    with safe_open(path, 'pt') as f: kept = f.metadata()
    assert Settings(**json.loads(kept['settings']))==play.settings() and set(json.loads(kept['accuracy']))=={*NAMES[:4], 'mean'}
    with pytest.raises(FileExistsError, match='path'): play.save(path)
    assert play.save(path, overwrite=True)==path
    with pytest.raises(ValueError, match='safetensors'): play.save(tmp_path/'m.pt')

def test_a_button_says_what_went_wrong(play, tmp_path):
    play.wait(30)
    play._file.value = str(tmp_path/'m.bin')
    play._save_clicked_button.click()
    assert 'safetensors' in play._error.value and play.shown()['accuracy'] is not None
    assert 'pg-done' in play._headline.value and 'pg-mean' not in play._headline.value      # the error stands in the numbers' place
    play._file.value = str(tmp_path/'m.safetensors')
    play._save_clicked_button.click()
    assert play.error is None and 'pg-mean' in play._headline.value and str(tmp_path/'m.safetensors') in play._saved.value

def test_a_saved_model_is_named_by_its_whole_path(play, tmp_path, monkeypatch):
    play.wait(30); monkeypatch.chdir(tmp_path)
    play._file.value = 'm.safetensors'; play._save_clicked_button.click()
    assert f'saved {tmp_path/"m.safetensors"},' in play._saved.value and (tmp_path/'m.safetensors').exists()

# -- alone

def test_the_notebook_works_where_it_was_asked_for(tmp_path, monkeypatch):
    (tmp_path/"it's here").mkdir(); monkeypatch.chdir(tmp_path/"it's here")
    book = json.loads(app.write_notebook(tmp_path/'p.ipynb').read_text())
    (source,) = [c['source'] for c in book['cells']]
    monkeypatch.chdir(tmp_path)
    exec('\n'.join(source.splitlines()[:2]), {})
    assert Path.cwd()==tmp_path/"it's here" and source.splitlines()[-1]=='Playground(Pool.embedded())'

def test_ports_that_are_taken(monkeypatch, capsys):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen(); taken = s.getsockname()[1]
        assert taken<app.free_port(taken)<taken+50
        with pytest.raises(OSError, match=f'port: none is free from {taken}'): app.free_port(taken, 1)
    assert app.free_port(taken)==taken
    for port in ('70000', '-1', '99999999999'):
        with pytest.raises(SystemExit): app.main(['--port', port])
    assert 'port' in capsys.readouterr().err

POOL = small_pool()

"The pools: what ships, what is refused, and that a damaged file is named."
import json, os, pickle, shutil, time
from importlib.resources import files
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file
from subspace_nb.experts import EmbeddedPool, Pool, Vision, Zoo, field, from_sheet, noise_seed, read_state, remembered, state_hash, to_sheet, write_state
from subspace_nb.tasks import TaskVector

zoo = Path(str(files('subspace_nb')/'zoo'))


@pytest.fixture(scope='module')
def pool(): return Pool.embedded()


@pytest.fixture
def copy(tmp_path):
    "A zoo folder of links, whose files can be replaced one by one."
    for p in zoo.rglob('*'):
        if p.is_file(): (tmp_path/p.relative_to(zoo)).parent.mkdir(parents=True, exist_ok=True); os.symlink(p, tmp_path/p.relative_to(zoo))
    return tmp_path


def replace(path, data): path.unlink(); path.write_bytes(data)


# what ships

def test_ready_in_time():
    t = time.perf_counter(); p = Pool.embedded(); assert time.perf_counter()-t<5 and len(p.tasks)==len(set(p.tasks))==20


def test_shipped_files(pool):
    index = json.loads((zoo/'index.json').read_text())
    on_disk = {str(p.relative_to(zoo)).replace(os.sep, '/') for p in zoo.rglob('*') if p.is_file()}-{'index.json'}
    assert set(index['files'])|{'LICENSES.md'}==on_disk|{'LICENSES.md'}
    assert sum(p.stat().st_size for p in zoo.rglob('*') if p.is_file())<128e6
    assert {p.suffix for p in zoo.rglob('*') if p.is_file()}<={'.json', '.safetensors', '.png', '.md', '.xz'}
    for name in index['files']: pool.zoo.file(name)


def test_tasks_are_what_they_claim(pool):
    kinds = [pool.info[t]['kind'] for t in pool.tasks]
    assert len(set(kinds))>=5 and kinds.count('print')<=10 and len(set(kinds[:8]))>=4
    notices = (zoo/'LICENSES.md').read_text()
    for t in pool.tasks:
        info = pool.info[t]
        assert info['licence'] and info['source'] and t in notices
        assert info['sizes']['test']>=200 and info['sizes']['val']>=100 and info['sizes']['proxy']>=16
        for split in pool.splits:
            x, y = pool.images(t, split), pool.labels(t, split)
            assert len(x)==len(y)==info['sizes'][split] and x.dtype==np.uint8 and x.shape[1:3]==(32, 32)
            assert 0<=y.min() and y.max()<len(info['classes'])


def test_no_image_is_in_two_splits(pool):
    for t in pool.tasks:
        seen = {}
        for split in pool.splits:
            for im in pool.images(t, split): assert seen.setdefault(im.tobytes(), split)==split, (t, split)


def test_regime(pool):
    base, expert = (np.array([pool.info[t][k]['test'] for t in pool.tasks]) for k in ('base', 'expert'))
    assert expert.mean()>=.85 and .35<=base.mean()/expert.mean()<=.65 and (expert>base).all()


def test_names_are_open_clips(pool):
    for block in range(6):
        for n in ('attn.in_proj_weight', 'attn.out_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight'):
            assert f'visual.transformer.resblocks.{block}.{n}' in pool.base
    assert all(set(t)==set(pool.base) for t in pool.task_vectors(3))


# scoring

def test_evaluate_matches_predict_and_is_remembered(pool):
    t = pool.tasks[0]; state = pool.expert(t)
    by_hand = (pool.predict(state, t)==pool.labels(t)).double().mean().item()
    table = pool.evaluate(state, [t])
    assert table.loc[t, 'accuracy']==by_hand==table.loc['mean', 'accuracy']
    assert table.loc[t, 'normalised']==pytest.approx(by_hand/pool.info[t]['expert']['test'])
    start = time.perf_counter(); pool.evaluate(state, [t]); assert time.perf_counter()-start<2
    assert '%' in table._repr_html_()


def test_recorded_accuracies_hold(pool):
    for t in pool.tasks[::7]: assert abs(pool.evaluate(pool.expert(t), [t]).loc[t, 'accuracy']-pool.info[t]['expert']['test'])<.01


def test_inputs_feed_the_layers(pool):
    x = pool.inputs(pool.tasks[1], 4)
    assert set(x)=={f'visual.transformer.resblocks.{i}.{n}' for i in range(6) for n in ('attn.in_proj_weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')}
    for k, v in x.items(): assert v.shape==(4*17, pool.base[k].shape[1]) and v.isfinite().all()
    with pytest.raises(ValueError, match='n must'): pool.inputs(pool.tasks[1], 0)


# what is refused

@pytest.mark.parametrize('name', ['experts/{}.safetensors', 'base.safetensors', 'labels.safetensors', 'images/{}.png', 'heads.safetensors'])
@pytest.mark.parametrize('how', ['flipped', 'cut', 'gone'])
def test_a_damaged_file_is_named(copy, name, how):
    t = EmbeddedPool(copy).tasks[0]; path = copy/name.format(t); data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    if how=='gone': path.unlink()
    else: replace(path, bytes(data) if how=='flipped' else bytes(data[:len(data)//2]))
    use = lambda p: (p.expert(t), p.labels(t), p.images(t), p.head(t))
    with pytest.raises((ValueError, FileNotFoundError), match=path.name): use(EmbeddedPool(copy))


def test_a_damaged_index_is_named(copy):
    replace(copy/'index.json', b'{"files": ')
    with pytest.raises(ValueError, match='index.json'): EmbeddedPool(copy)
    with pytest.raises(FileNotFoundError, match='index.json'): Zoo(copy/'nowhere')


@pytest.mark.parametrize('call, error, match', [
    (lambda p: p.evaluate(p.base, ['juggling']), KeyError, 'juggling'), (lambda p: p.evaluate(p.base, 0), ValueError, 'tasks'),
    (lambda p: p.evaluate(p.base, 21), ValueError, 'tasks'), (lambda p: p.evaluate(p.base, 1, split='train'), ValueError, 'split'),
    (lambda p: p.evaluate({}, 1), ValueError, 'missing in state'), (lambda p: p.evaluate(p.base | {'extra': torch.ones(1)}, 1), ValueError, 'extra'),
    (lambda p: p.evaluate(p.task_vector(p.tasks[0]), 1), TypeError, 'apply'), (lambda p: p.evaluate(3, 1), TypeError, 'state'),
    (lambda p: p.evaluate(p.base | {'visual.proj': p.base['visual.proj']/0}, 1), ValueError, 'visual.proj'),
    (lambda p: p.images('digits', 'train'), ValueError, 'split'), (lambda p: p.task_vectors(['digits', 'x']), KeyError, 'x')])
def test_refusals(pool, call, error, match):
    with pytest.raises(error, match=match): call(pool)


# local files

def states(n=2):
    torch.manual_seed(0)
    base = {'a.weight': torch.randn(4, 3), 'ids': torch.arange(3)}
    return base, {f't{i}': {**base, 'a.weight': base['a.weight']+torch.randn(4, 3)} for i in range(n)}


def test_from_files_reads_safetensors_and_plain_torch_files(tmp_path):
    base, experts = states()
    save_file(base, tmp_path/'base.safetensors'); save_file(experts['t0'], tmp_path/'t0.safetensors'); torch.save(experts['t1'], tmp_path/'t1.pt')
    p = Pool.from_files(tmp_path/'base.safetensors', {'t0': tmp_path/'t0.safetensors', 't1': tmp_path/'t1.pt'}, lambda s, t, split: float(torch.equal(s['a.weight'], experts[t]['a.weight'])))
    assert all(torch.allclose(p.task_vector(t)['a.weight'], experts[t]['a.weight']-base['a.weight']) for t in p.tasks)
    assert list(p.task_vector('t0'))==['a.weight'] and torch.equal(p.expert('t0')['ids'], base['ids'])
    table = p.evaluate(experts['t0'], split='val')
    assert table.loc['t0', 'accuracy']==1 and table.loc['t1', 'accuracy']==0


class Evil:
    def __reduce__(self): return os.system, ('touch pwned',)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'evil.pt').write_bytes(pickle.dumps(Evil())); torch.save({'w': Evil()}, tmp_path/'evil2.pt')
    for f in ('evil.pt', 'evil2.pt'):
        with pytest.raises(ValueError, match=f): read_state(tmp_path/f)
    assert not (tmp_path/'pwned').exists()


def test_what_does_not_fit_is_listed():
    base, experts = states()
    for bad, match in (({'a.weight': torch.ones(2, 2), 'ids': base['ids']}, 'shape'), ({'a.weight': base['a.weight']}, 'ids'),
                       ({**base, 'ids': base['ids']+1}, 'ids'), ({**base, 'a.weight': base['a.weight']*float('nan')}, 'NaN')):
        with pytest.raises(ValueError, match=match): Pool.from_files(base, {'t': bad}).task_vectors()


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_weights(data):
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        for suffix in ('.safetensors', '.pt'):
            path = Path(d)/f'f{suffix}'; path.write_bytes(data)
            with pytest.raises(ValueError, match='expert'): read_state(path, 'expert')


# small parts

@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.uint8, st.one_of(st.tuples(st.integers(1, 60), st.just(32), st.just(32)), st.tuples(st.integers(1, 30), st.just(32), st.just(32), st.just(3)))))
def test_sheet_is_lossless(x): assert (from_sheet(to_sheet(x), len(x))==x).all()


def test_camera_is_deterministic_and_differs_by_split():
    x = np.full((3, 32, 32, 3), 100, np.uint8); see = lambda split: field(x, noise_seed('digits', split), .5, 128, 16)
    assert (see('test')==see('test')).all() and not (see('test')==see('val')).all() and see('test').shape==x.shape


def test_a_damaged_cache_only_costs_time(tmp_path, monkeypatch):
    monkeypatch.setenv('SUBSPACE_NB_CACHE', str(tmp_path)); made = []
    make = lambda: made.append(1) or torch.arange(6.)
    for _ in range(2): assert torch.equal(remembered('x', make), torch.arange(6.))
    assert len(made)==1
    path = tmp_path/'x.safetensors'; path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(remembered('x', make), torch.arange(6.)) and len(made)==2
    monkeypatch.setenv('SUBSPACE_NB_CACHE', str(path))                 # a file where a folder should be
    assert torch.equal(remembered('y', make), torch.arange(6.))


def test_nothing_is_left_of_an_interrupted_write(tmp_path, monkeypatch):
    write_state({'w': torch.ones(2)}, tmp_path/'w.safetensors')
    monkeypatch.setattr('os.replace', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError): write_state({'w': torch.zeros(2)}, tmp_path/'w.safetensors')
    assert torch.equal(read_state(tmp_path/'w.safetensors')['w'], torch.ones(2))


def test_state_hash_sees_every_change():
    s = {'a': torch.ones(3), 'b': torch.zeros(2, dtype=torch.int64)}; h = state_hash(s)
    assert h==state_hash(dict(reversed(list(s.items()))))
    for other in ({**s, 'a': torch.tensor([1., 1., 2.])}, {**s, 'a': s['a'].double()}, {'a': s['a']}, {**s, 'b': s['b']+1}): assert state_hash(other)!=h


def test_a_module_is_scored_like_the_weights_it_holds(pool):
    "And is scored again each time: nobody knows what else it computes."
    state = pool.task_vector('digits').apply(pool.base, .5)
    model = Vision(**pool.zoo.index['model']); model.load_state_dict(state)
    assert pool.evaluate(model, ['digits']).equals(pool.evaluate(state, ['digits']))
    before = pool.evaluate(model, ['digits']).loc['mean', 'accuracy']
    with torch.no_grad(): model.visual.proj.zero_()
    assert pool.evaluate(model, ['digits']).loc['mean', 'accuracy']<before
    assert pool.evaluate(state, ['digits']).loc['mean', 'accuracy']==before


def test_inputs_may_come_before_the_first_score():
    p = Pool.embedded()
    x = p.inputs('digits', 2)
    assert not any(v.is_inference() for v in x.values()) and p.evaluate(p.base, ['digits']).loc['mean', 'accuracy']>0

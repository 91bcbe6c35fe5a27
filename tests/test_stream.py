"""Streamed merges: the same bits as in memory, whatever the files, the workers and the accidents."""
import json, os, re, shutil, signal, subprocess, sys, textwrap
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
import pytest
import torch
from conftest import gap
from hypothesis import given, strategies as st
from safetensors.torch import save_file

from subspace_nb.boost import subspace_boosting
from subspace_nb.esm import apply_esm, esd_keys, esm
from subspace_nb.hub import Adapter, Checkpoint, Layout, join_qkv, merge_adapters, split_qkv
from subspace_nb.merge import lines
from subspace_nb.rivals import regmean, room_for, tsv_m
from subspace_nb.stream import Journal, Kept, advance, by_mergekit, digits, merge_files, method_options, methods, next_digit, partial_folder, sorted_whole
from subspace_nb.tasks import TaskVector, task_vector

SHAPES = {'token_embedding.weight': (60, 8), 'scale': (), 'none': (0,), 'visual.proj': (8, 6), 'conv.weight': (4, 3, 2, 2),
          **{f'layers.{l}.{k}': s for l in range(3) for k, s in {'self_attn.k_proj.weight': (8, 8), 'self_attn.q_proj.weight': (8, 8), 'self_attn.v_proj.weight': (8, 8), 'self_attn.q_proj.bias': (8,),
             'self_attn.k_proj.bias': (8,), 'self_attn.v_proj.bias': (8,), 'mlp.fc1.weight': (20, 8), 'mlp.fc2.weight': (8, 20), 'layer_norm1.weight': (8,)}.items()}}

def make(seed, dtype=torch.float32, ints=True):
    rng = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(s, generator=rng, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}
    return state | ({'position_ids': torch.arange(6)[None], 'flag': torch.tensor(True)} if ints else {})

def folder(path, state, shards=1, **config):
    path.mkdir()
    names = list(state)
    if shards==1: save_file(state, path/'model.safetensors', metadata={'format': 'pt'})
    else:
        where = {k: f'model-{i%shards+1:05}-of-{shards:05}.safetensors' for i, k in enumerate(names)}
        for f in set(where.values()): save_file({k: state[k] for k in names if where[k]==f}, path/f, metadata={'format': 'pt'})
        (path/'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': where}))
    if config: (path/'config.json').write_text(json.dumps(config))
    return path

@pytest.fixture
def models(tmp_path):
    base = make(0)
    states = [{k: v+.1*w if v.is_floating_point() else v for (k, v), w in zip(base.items(), make(i).values())} for i in range(1, 4)]
    return folder(tmp_path/'base', base, 3, hidden_act='gelu'), [folder(tmp_path/f'e{i}', s, 1+i%2) for i, s in enumerate(states)]

def loaded(path): return dict(Checkpoint(path))

def reference(base, experts, method, alpha=1., beta=None, slope=None, start=None, join=False, attention='per_qkv', **options):
    base, experts = loaded(base), [loaded(e) for e in experts]
    floats = {k: v for k, v in base.items() if v.is_floating_point()}
    layout = Checkpoint
    join = join or methods[method].joined or attention!='per_qkv'
    view = (lambda s: TaskVector(join_qkv(s, LAYOUT))) if join else TaskVector
    taus = [view(task_vector(base, e)) for e in experts]
    if method=='model_stock': options['base'] = floats
    if method=='higher_order_boosting': options |= dict(beta=beta or 0., attention=attention)
    tau = methods[method].fn(taus, **options)
    if beta is not None and method!='higher_order_boosting': tau = subspace_boosting(tau, beta, attention, head_width=4)
    if slope is not None: tau = lines(tau, taus, slope, start)
    return TaskVector(split_qkv(tau, floats, LAYOUT) if join else tau).apply(base, alpha)

from subspace_nb.hub import layouts
LAYOUT = next(l for l in layouts if l.name=='transformers CLIP')

def same(out, want):
    got = loaded(out)
    assert set(got)==set(want)
    bad = [k for k in want if got[k].dtype!=want[k].dtype or got[k].shape!=want[k].shape or not torch.equal(got[k], want[k])]
    assert not bad, bad

CASES = [(m, {}) for m in methods if not methods[m].inputs]+[('by_mergekit', dict(weight=[.3, [['fc1', .9], [None, .4]], 1.], density=[.5, .2, 1.], trim='magnitude', consensus=True, normalize=True)), ('by_mergekit', dict(trim='random', density=[.5]*3, rescale=True, seed=4))]+[('ties', dict(keep=.37, alpha=.4)), ('knots', dict(keep=.3, alpha=.5, slope=.2)), ('knots', dict(cut=3., beta=.1)), ('breadcrumbs', dict(density=.3, gamma=0., slope=.1)), ('breadcrumbs', dict(density=1., gamma=.3)), ('breadcrumbs', dict(density=0., gamma=1.)), ('by_mergekit', dict(trim='outliers', density=[.3, .6, 0.], gamma=[.1, .5, 0.])), ('by_mergekit', dict(trim='magnitude', density=[0., 1., .3], lam=.4)), ('by_mergekit', dict(trim='random', density=[.5, .2, 1.], seed=4)), ('dare', dict(drop=.9, seed=11)), ('consensus', dict(lam=.3, agree=3)), ('breadcrumbs', dict(density=.4, gamma=.1)),
    ('iso_cts', dict(common=.6)), ('task_arithmetic', dict(beta=0., alpha=.3)), ('ties', dict(beta=.05, slope=.4)), ('dare', dict(slope=.3)), ('tsv_m', dict(slope=.3, beta=.1)), ('consensus', dict(slope=.2, start=.1)),
    ('task_arithmetic', dict(beta=0., attention='full_attn')), ('task_arithmetic', dict(beta=.1, attention='per_head', head_width=4)), ('higher_order_boosting', dict(beta=.1, pi=.1, scale='kempf'))]

@pytest.mark.parametrize('method, options', CASES, ids=lambda x: x if isinstance(x, str) else '-'.join(map(str, x)))
def test_same_bits(models, tmp_path, method, options):
    base, experts = models
    out = merge_files(base, experts, tmp_path/'out', method, device='cpu', strip=50, **options)
    same(out, reference(base, experts, method, **{k: v for k, v in options.items() if k!='head_width'}))
    assert Checkpoint(out).shards.keys()==Checkpoint(base).shards.keys() and (out/'config.json').read_text()==(base/'config.json').read_text()
    assert not partial_folder(out).exists()

@pytest.mark.parametrize('b, e', [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16), (torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize('method, options', [('ties', {}), ('dare', dict(slope=.4)), ('tsv_m', {}), ('task_arithmetic', dict(beta=0., slope=.1)), ('knots', dict(keep=.3)), ('breadcrumbs', dict(density=.4)), ('model_stock', {})])
def test_types(tmp_path, b, e, method, options):
    base, experts = folder(tmp_path/'b', make(0, b)), [folder(tmp_path/f'e{i}', make(i, e)) for i in (1, 2)]
    same(merge_files(base, experts, tmp_path/'out', method, device='cpu', strip=64, **options), reference(base, experts, method, **options))

@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=60), st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_selection_is_exact(values, data, dtype):
    x = torch.tensor(values, dtype=dtype).abs()
    k, prefix = data.draw(st.integers(1, len(x))), 0
    rank = k
    for level in range(dtype.itemsize//2):
        d, rank = next_digit([digits(p, level, prefix) for p in x.split(7)], rank)
        prefix = prefix<<16 | d
    assert torch.tensor(prefix, dtype=torch.int32 if dtype==torch.float32 else torch.int64).view(dtype)==x.kthvalue(k).values

@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.data())
def test_ranks_of_a_tensor_in_strips(values, data):
    x = torch.tensor(values, dtype=torch.float32)
    low = data.draw(st.integers(0, len(x)))
    high = data.draw(st.integers(low, len(x)))
    pieces = x.abs().split(7)
    kept = Kept(lambda: iter(pieces), low, high, torch.float32)
    want = torch.zeros(len(x), dtype=torch.bool)
    want[x.abs().argsort(stable=True)[low:high]] = True
    assert torch.equal(torch.cat([kept(p) for p in pieces]), want)

@pytest.mark.parametrize('method, options', [('breadcrumbs', dict(density=.4, gamma=.1)), ('breadcrumbs', dict(density=.9, gamma=.3)), ('ties', {}), ('knots', {}), ('by_mergekit', dict(trim='magnitude', density=[.3, .5, .1], consensus=True)),
    ('by_mergekit', dict(trim='outliers', density=[.3, .5, .1], weight=[.3, .7, 1.], normalize=True)), ('by_mergekit', dict(trim='random', density=[.3, .5, .1])), ('by_mergekit', dict(trim='magnitude', density=[.5]*3, rescale=True))])
def test_strips_of_equal_magnitudes(tmp_path, method, options):
    rng = torch.Generator().manual_seed(0)
    states = [{'embed': torch.randint(-2, 3, (30, 9), generator=rng)*.5, 'b': torch.randint(-1, 2, (40,), generator=rng)*1.} for _ in range(4)]
    base, *experts = [folder(tmp_path/str(i), s) for i, s in enumerate(states)]
    whole = loaded(merge_files(base, experts, tmp_path/'whole', method, device='cpu', **options))
    for strip in (1, 7, 100): same(merge_files(base, experts, tmp_path/f'out{strip}', method, device='cpu', strip=strip, **options), whole)

@pytest.mark.parametrize('trim, gamma', [('magnitude', ()), ('outliers', [.1, .2])])
def test_large_tensors_are_trimmed_in_strips(tmp_path, trim, gamma):
    rng = torch.Generator().manual_seed(0)
    states = [{'embed': torch.randint(-9, 10, (1100, 1000), generator=rng)*.5} for _ in range(3)]           # full of equal magnitudes
    base, *experts = [folder(tmp_path/str(i), s) for i, s in enumerate(states)]
    options = dict(trim=trim, density=[.3, .5], gamma=gamma)
    want = by_mergekit([task_vector(states[0], s) for s in states[1:]], **options).apply(states[0])
    assert sorted_whole<1100*1000
    for strip in (2**17+3, 2**20): same(merge_files(base, experts, tmp_path/f'out{strip}', 'by_mergekit', device='cpu', strip=strip, **options), want)

def test_random_numbers_go_on_where_they_stopped():
    g = torch.Generator().manual_seed(3); state = g.get_state()
    x = torch.rand(5_000_000, generator=g)
    h = torch.Generator(); h.set_state(advance(state, 4_999_000))
    assert torch.equal(torch.rand(1000, generator=h), x[-1000:])

@pytest.mark.parametrize('pool', ['threads', 'processes'])
def test_executors(models, tmp_path, pool):
    base, experts = models
    make_pool = (lambda: ThreadPoolExecutor(3)) if pool=='threads' else (lambda: ProcessPoolExecutor(2, mp_context=get_context('spawn'), initializer=torch.set_num_threads, initargs=(1,)))
    with make_pool() as executor:
        for method, options in (('ties', dict(slope=.3)), ('dare', dict(beta=0.)), ('tsv_m', {})):
            same(merge_files(base, experts, tmp_path/method, method, device='cpu', strip=50, executor=executor, **options), reference(base, experts, method, **options))

def test_torch_files_and_single_files(models, tmp_path):
    base, experts = models
    torch.save(loaded(base), tmp_path/'b.pt'); torch.save({'state_dict': loaded(experts[0])}, tmp_path/'e.bin')
    out = merge_files(tmp_path/'b.pt', [tmp_path/'e.bin', experts[1]], tmp_path/'out', alpha=.5, device='cpu')
    same(out, reference(base, experts[:2], 'task_arithmetic', .5))
    assert [f.name for f in sorted(out.iterdir())]==['model.safetensors', 'subspace_nb.json']
    (tmp_path/'old').mkdir(); state = loaded(base); names = list(state)
    for i in (0, 1): torch.save({k: state[k] for k in names[i::2]}, tmp_path/'old'/f'pytorch_model-0000{i+1}-of-00002.bin')
    (tmp_path/'old'/'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': {k: f'pytorch_model-0000{j%2+1}-of-00002.bin' for j, k in enumerate(names)}}))
    out = merge_files(tmp_path/'old', experts[:2], tmp_path/'out2', alpha=.5, device='cpu')
    same(out, reference(base, experts[:2], 'task_arithmetic', .5))
    assert len(Checkpoint(out).shards)==2 and not list(out.glob('*.bin*'))

def adapter(path, seed, base):
    rng = torch.Generator().manual_seed(seed)
    path.mkdir()
    names = [k.removesuffix('.weight') for k in base if re.search(r'[qv]_proj\.weight|fc1\.weight', k)]
    save_file({f'base_model.model.{k}.lora_{x}.weight': torch.randn(*((2, base[k+'.weight'].shape[1]) if x=='A' else (base[k+'.weight'].shape[0], 2)), generator=rng) for k in names for x in 'AB'}, path/'adapter_model.safetensors')
    (path/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=2, lora_alpha=2)))
    return path

@pytest.mark.parametrize('method', ['task_arithmetic', 'ties', 'tsv_m'])
def test_adapters_and_experts_together(models, tmp_path, method):
    base, experts = models
    state = loaded(base)
    paths = [adapter(tmp_path/f'a{i}', i, state) for i in range(2)]
    full = [folder(tmp_path/f'f{i}', {k: v.double() if v.is_floating_point() else v for k, v in (Adapter(p).task_vector(state).apply(state)).items()}) for i, p in enumerate(paths)]
    out = loaded(merge_files(base, [*paths, experts[0]], tmp_path/'out', method, device='cpu'))
    want = reference(base, [*full, experts[0]], method)
    for k in want: torch.testing.assert_close(out[k], want[k], rtol=2e-3, atol=2e-3)

# what headers can tell

def test_what_does_not_fit(models, tmp_path):
    base, experts = models
    state = loaded(experts[0])
    cases = {'missing in bad0': {k: v for k, v in state.items() if k!='visual.proj'}, 'head.weight: in bad1 only': state | {'head.weight': torch.ones(2, 2)},
             r'scale: shape \(\) in base, \(1,\)': state | {'scale': torch.ones(1)}, 'flag: torch.bool in base, torch.float32': state | {'flag': torch.tensor(1.)}}
    for i, (why, s) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=why): merge_files(base, [experts[1], folder(tmp_path/f'bad{i}', s)], tmp_path/'out', device='cpu')
    both = folder(tmp_path/'both', {k: v for k, v in state.items() if k not in ('visual.proj', 'scale')} | {'h': torch.ones(1), 'g': torch.ones(1)})
    with pytest.raises(ValueError) as e: merge_files(base, [experts[1], both], tmp_path/'out', device='cpu')
    assert all(k in str(e.value) for k in ('visual.proj: missing', 'scale: missing', 'h: in both only', 'g: in both only'))
    with pytest.raises(ValueError, match='activation: gelu in base, quick_gelu'): merge_files(base, [folder(tmp_path/'act', state, hidden_act='quick_gelu')], tmp_path/'out', device='cpu')
    late = {'e.*ln: NaN or Inf': 'nan', 'position_ids: torch.int64 entries differ': 'ints'}
    for why, name in {'NaN or Inf': 'nan', 'position_ids: torch.int64 entries differ': 'ints'}.items():
        s = state | ({'scale': torch.tensor(float('inf'))} if name=='nan' else {'position_ids': torch.arange(6)[None]+1})
        with pytest.raises(ValueError, match=f'{name}: .*{why}'): merge_files(base, [experts[1], folder(tmp_path/name, s)], tmp_path/'out', device='cpu')
    assert not (tmp_path/'out').exists() and not partial_folder(tmp_path/'out').exists()

@pytest.mark.parametrize('change, error, why', [
    (dict(start=.5), ValueError, 'start belongs'), (dict(attention_beta=.5), ValueError, 'attention_beta goes'), (dict(join='no'), TypeError, 'join'), (dict(method='magic'), ValueError, 'method must be one of'), (dict(keep=.2), ValueError, 'has no option keep'), (dict(method='ties', keep=2), ValueError, 'keep'), (dict(method='dare', drop=1), ValueError, 'drop'),
    (dict(method='dare', seed=-1), ValueError, 'seed'), (dict(method='consensus', agree=9), ValueError, 'agree'), (dict(method='iso_cts', common=2), ValueError, 'common'), (dict(alpha=float('nan')), ValueError, 'alpha'),
    (dict(alpha='x'), TypeError, 'alpha'), (dict(alpha=None), TypeError, 'alpha'), (dict(beta=-1), ValueError, 'beta'), (dict(attention_beta=3), ValueError, 'attention_beta'), (dict(attention='half'), ValueError, 'attention'),
    (dict(slope=float('inf')), ValueError, 'slope'), (dict(dtype='int8'), ValueError, 'dtype'), (dict(dtype='big'), ValueError, 'dtype'), (dict(method='by_mergekit', weight=[1.]), ValueError, 'weight must hold'), (dict(head_width=0), ValueError, 'head_width'), (dict(experts=[]), ValueError, 'experts is empty'), (dict(method='consensus', n=1), ValueError, 'at least 2'),
    (dict(experts=['nothing']), FileNotFoundError, 'nothing'), (dict(out='base'), ValueError, 'replace an input'), (dict(out='.'), ValueError, 'replace an input'), (dict(skip='.'), ValueError, 'no floating')])
def test_refused_before_any_work(models, tmp_path, change, error, why):
    base, experts = models
    change = dict(change)
    experts = [tmp_path/e for e in change.pop('experts')] if 'experts' in change else experts[:change.pop('n', 3)]
    out, method = tmp_path/change.pop('out', 'out'), change.pop('method', 'task_arithmetic')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(error, match=why): merge_files(base, experts, out, method, device='cpu', overwrite='out' not in str(out), **change)
    assert sorted(tmp_path.rglob('*'))==before

def test_the_same_expert_twice(models, tmp_path):
    base, experts = models
    with pytest.raises(ValueError, match='twice'): merge_files(base, [experts[0], experts[0]], tmp_path/'out', device='cpu')
    shutil.copytree(experts[0], tmp_path/'copy')
    with pytest.raises(ValueError, match='same expert'): merge_files(base, [experts[0], tmp_path/'copy'], tmp_path/'out', device='cpu')

def test_too_many_experts_for_a_matrix(tmp_path):
    states = [{'a.weight': torch.randn(2, 9), 'b.weight': torch.randn(8, 8)} for _ in range(4)]
    base, *experts = [folder(tmp_path/str(i), s) for i, s in enumerate(states)]
    floats = [dict(Checkpoint(p)) for p in (base, *experts)]
    taus = [task_vector(floats[0], s) for s in floats[1:]]
    same(merge_files(base, experts, tmp_path/'out', 'tsv_m', device='cpu'), tsv_m(taus, room_for(3), device='cpu').apply(floats[0]))     # `a` is averaged, as in memory
    inputs = [{'b.weight': torch.randn(9, 8)} for _ in experts]
    for i, x in enumerate(inputs): save_file(x, tmp_path/f'in{i}.safetensors')
    files = [tmp_path/f'in{i}.safetensors' for i in range(3)]
    with pytest.raises(ValueError, match='singular values of a.weight; skip can'): merge_files(base, experts, tmp_path/'esm', 'esm', inputs=files, device='cpu')
    merge_files(base, experts, tmp_path/'esm', 'esm', inputs=files, device='cpu', skip='^a')

def test_tied_tensors_stored_once_and_twice(tmp_path):
    w = [torch.randn(9, 4) for _ in range(3)]
    def t5(w, twice=False, other=None):
        s = {'shared.weight': w, 'encoder.block.0.layer.0.SelfAttention.q.weight': torch.randn(4, 4)}
        return s | ({'lm_head.weight': w.clone() if other is None else other} if twice else {})
    base, once, twice = folder(tmp_path/'b', t5(w[0])), folder(tmp_path/'o', t5(w[1])), folder(tmp_path/'t', t5(w[2], True))
    out = loaded(merge_files(base, [once, twice], tmp_path/'out', device='cpu'))
    assert set(out)==set(loaded(base)) and torch.allclose(out['shared.weight'], w[1]+w[2]-w[0], atol=1e-6)
    apart = folder(tmp_path/'x', t5(w[2], True, torch.randn(9, 4)))
    with pytest.raises(ValueError, match='lm_head.weight and shared.weight differ'): merge_files(base, [once, apart], tmp_path/'out2', device='cpu')
    full = folder(tmp_path/'fb', t5(w[0], True))
    out = loaded(merge_files(full, [once, twice], tmp_path/'out3', device='cpu'))
    assert torch.equal(out['lm_head.weight'], out['shared.weight'])

# layers with their inputs

def entering(tmp_path, n, names, rows=12):
    rng, width = torch.Generator().manual_seed(5), {'mlp.fc1.weight': 8, 'mlp.fc2.weight': 20, 'self_attn.in_proj_weight': 8}
    states = [{f'layers.{l}.{k}': torch.randn(rows, width[k], generator=rng) for l in range(3) for k in names} for _ in range(n)]
    for i, s in enumerate(states): save_file(s, tmp_path/f'in{i}.safetensors')
    return [tmp_path/f'in{i}.safetensors' for i in range(n)], states

@pytest.mark.parametrize('variant', ['released', 'cvpr', 'esd', 'svd'])
def test_esm_from_files(models, tmp_path, variant):
    base, experts = models
    files, states = entering(tmp_path, 3, ('mlp.fc1.weight', 'mlp.fc2.weight', 'self_attn.in_proj_weight'))
    state = {k: v for k, v in loaded(base).items() if v.is_floating_point()}
    taus = [TaskVector(join_qkv(task_vector(loaded(base), loaded(e)), LAYOUT)) for e in experts]
    want = split_qkv(apply_esm(esm(taus, states, variant, device='cpu'), join_qkv(state, LAYOUT), .7, esd_keys(taus, states)), state, LAYOUT)
    out = loaded(merge_files(base, experts, tmp_path/'out', 'esm', .7, inputs=files, variant=variant, device='cpu'))
    for k, v in want.items(): torch.testing.assert_close(out[k], v, rtol=2e-6, atol=2e-6)
    assert json.loads((tmp_path/'out'/'subspace_nb.json').read_text())['inputs'][0]['name']=='in0.safetensors'

def test_regmean_from_files(models, tmp_path):
    base, experts = models
    files, states = entering(tmp_path, 3, ('mlp.fc1.weight', 'self_attn.in_proj_weight'))
    state = {k: v for k, v in loaded(base).items() if v.is_floating_point()}
    taus = [TaskVector(join_qkv(task_vector(loaded(base), loaded(e)), LAYOUT)) for e in experts]
    want = split_qkv(regmean(taus, states, device='cpu').apply(join_qkv(state, LAYOUT)), state, LAYOUT) | {k: v for k, v in loaded(base).items() if k not in state}
    same(merge_files(base, experts, tmp_path/'out', 'regmean', inputs=files, device='cpu'), want)

def test_inputs_refused(models, tmp_path):
    base, experts = models
    files, states = entering(tmp_path, 3, ('mlp.fc1.weight', 'mlp.fc2.weight'))
    save_file({'layers.0.self_attn.q_proj.weight': torch.ones(3, 8)}, tmp_path/'apart.safetensors'); save_file({k: v[:, 1:].contiguous() for k, v in states[0].items()}, tmp_path/'narrow.safetensors')
    save_file({k: v for k, v in states[0].items() if 'fc1' in k}, tmp_path/'few.safetensors')
    for method, inputs, why, more in (('esm', files[:2], 'one file for each of 3', {}), ('ties', files, 'ties does not use', {}), ('esm', (), 'needs what enters', {}), ('regmean', [tmp_path/'apart.safetensors', *files[1:]], 'go by their joined name', {}),
            ('esm', [tmp_path/'narrow.safetensors', *files[1:]], r'not \(n, ', {}), ('esm', [tmp_path/'few.safetensors', *files[1:]], 'missing in few', {}), ('esm', files, 'do not go with esm', dict(beta=0.)), ('esm', files, 'variant', dict(variant='best'))):
        with pytest.raises(ValueError, match=why): merge_files(base, experts, tmp_path/'out', method, inputs=inputs, device='cpu', **more)
    assert not (tmp_path/'out').exists() and not partial_folder(tmp_path/'out').exists()

# adapters in their factors

@pytest.mark.parametrize('method, options', [('task_arithmetic', {}), ('average', dict(alpha=2.)), ('task_arithmetic', dict(beta=0., alpha=.5)), ('average', dict(beta=.2))])
def test_adapters_alone_are_merged_in_their_factors(models, tmp_path, monkeypatch, method, options):
    base, _ = models
    state, n, alpha = loaded(base), 3, options.get('alpha', 1.)
    xs = [Adapter(adapter(tmp_path/f'a{i}', i, state)) for i in range(n)]
    factors = merge_adapters(xs, [1/n if method=='average' else 1.]*n, options.get('beta'))
    want = {k: (v+alpha*(factors[k][0]@factors[k][1]) if k in factors else v) for k, v in state.items()}
    monkeypatch.setattr(Adapter, 'delta', lambda self, name, base=None: pytest.fail(f'{name} was formed') if name in self else None)     # no expert's own product is needed
    same(merge_files(base, [x.path for x in xs], tmp_path/'out', method, device='cpu', **options), want)

def test_dense_and_factored_boosting_agree(models, tmp_path):
    base, _ = models
    state = loaded(base)
    paths = [adapter(tmp_path/f'a{i}', i, state) for i in range(2)]
    def exact(a, k, v): return v.double()+(a[k][0].double()@a[k][1].double() if k in a else 0) if v.is_floating_point() else v     # in float64: float32's noise would fill the null directions
    full = [folder(tmp_path/f'f{i}', {k: exact(Adapter(p), k, v) for k, v in state.items()}) for i, p in enumerate(paths)]
    a, b = (loaded(merge_files(base, e, tmp_path/o, beta=0., device='cpu')) for e, o in ((paths, 'thin'), (full, 'full')))
    for k in a: torch.testing.assert_close(a[k].double(), b[k].double(), rtol=1e-3, atol=1e-3)

# types of the result

@pytest.mark.parametrize('method, options', [('task_arithmetic', {}), ('ties', dict(slope=.3)), ('tsv_m', {})])
@pytest.mark.parametrize('kind', ['bfloat16', 'float64'])
def test_type_of_the_result(models, tmp_path, kind, method, options):
    base, experts = models
    (base/'config.json').write_text('{"dtype": "float32", "hidden_act": "gelu"}')
    got = loaded(merge_files(base, experts, tmp_path/'out', method, device='cpu', dtype=kind, **options))
    state = {k: v.double() if kind=='float64' and v.is_floating_point() else v for k, v in loaded(base).items()}
    want = reference(folder(tmp_path/'wide', state, 3), experts, method, **options)
    for k, v in got.items(): torch.testing.assert_close(v, want[k].to(getattr(torch, kind)) if v.is_floating_point() else want[k], rtol=1e-12 if kind=='float64' else 0, atol=1e-14)   # the norms' order of summation
    assert json.loads((tmp_path/'out'/'config.json').read_text())['dtype']==kind

# accidents

@pytest.mark.parametrize('accident, error', {'a corrupted shard': 'is damaged: its header is not JSON', 'a truncated file': 'is damaged: it is truncated', 'a shard that is missing': 'shards are missing',
                                             'a malicious pickle': 'more than plain weights', 'a path that leaves the folder': 'leaves the folder'}.items(), ids=lambda x: x.replace(' ', '-') if x.startswith('a ') else '')
def test_damaged_or_hostile_experts(models, tmp_path, accident, error):
    base, experts = models
    shutil.copytree(base, bad := tmp_path/'bad')
    index, shard = bad/'model.safetensors.index.json', bad/'model-00001-of-00003.safetensors'
    if accident=='a corrupted shard': shard.write_bytes(shard.read_bytes()[:8]+b'#'+shard.read_bytes()[9:])
    if accident=='a truncated file': os.truncate(shard, shard.stat().st_size-1)
    if accident=='a shard that is missing': shard.unlink()
    if accident=='a path that leaves the folder': index.write_text(index.read_text().replace(shard.name, '../base/'+shard.name))
    if accident=='a malicious pickle':
        class Boom:
            def __reduce__(self): return os.mkdir, (str(tmp_path/'owned'),)
        shutil.rmtree(bad); torch.save({'w': Boom()}, bad := tmp_path/'bad.pt')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises((ValueError, FileNotFoundError), match=error): merge_files(base, [experts[0], bad], tmp_path/'out', device='cpu')
    assert sorted(tmp_path.rglob('*'))==before                                       # nothing was made, nothing was run

def test_overwrite_and_existing_output(models, tmp_path):
    base, experts = models
    (tmp_path/'out').mkdir(); (tmp_path/'out'/'mine.txt').write_text('x')
    with pytest.raises(FileExistsError, match='overwrite'): merge_files(base, experts, tmp_path/'out', device='cpu')
    with pytest.raises(ValueError): merge_files(base, experts, tmp_path/'out', 'magic', device='cpu', overwrite=True)
    assert (tmp_path/'out'/'mine.txt').exists()
    merge_files(base, experts, tmp_path/'out', device='cpu', overwrite=True)
    assert not (tmp_path/'out'/'mine.txt').exists() and not list(tmp_path.glob('.*'))

class Meanwhile(ThreadPoolExecutor):
    "Does something while a merge runs."
    def __init__(self, what): super().__init__(1); self.what, self.n = what, 0
    def submit(self, fn, *args):
        self.n += 1
        if self.n==5: self.what()
        return super().submit(fn, *args)

def test_what_appears_meanwhile_is_not_deleted(models, tmp_path):
    base, experts = models
    out = tmp_path/'out'
    def appear(): out.mkdir(); (out/'mine.txt').write_text('x')
    with Meanwhile(appear) as executor, pytest.raises(FileExistsError, match='has appeared while'): merge_files(base, experts, out, device='cpu', executor=executor)
    assert (out/'mine.txt').exists() and partial_folder(out).exists()
    with pytest.raises(FileExistsError, match='overwrite'): merge_files(base, experts, out, device='cpu')
    with Meanwhile(lambda: None) as executor: merge_files(base, experts, out, device='cpu', executor=executor, overwrite=True)
    assert executor.n==0 and not (out/'mine.txt').exists() and not list(tmp_path.glob('.*'))                     # nothing was merged twice
    same(out, reference(base, experts, 'task_arithmetic'))

def test_what_appears_while_inputs_are_hashed(models, tmp_path, monkeypatch):
    import subspace_nb.stream as stream
    base, experts = models
    hashes_of = stream.hashes_of
    monkeypatch.setattr(stream, 'hashes_of', lambda x: ((tmp_path/'out').mkdir(exist_ok=True), hashes_of(x))[1])
    with pytest.raises(FileExistsError, match='exists by now'): merge_files(base, experts, tmp_path/'out', device='cpu')
    assert not list((tmp_path/'out').iterdir()) and not partial_folder(tmp_path/'out').exists()

def test_output_behind_a_link(models, tmp_path):
    base, experts = models
    (tmp_path/'disk').mkdir(); (tmp_path/'disk'/'real').mkdir(); (tmp_path/'out').symlink_to('disk/real')
    for _ in range(2): assert merge_files(base, experts, tmp_path/'out', device='cpu', overwrite=True)==(tmp_path/'disk'/'real').resolve()
    assert (tmp_path/'out').is_symlink() and [f.name for f in (tmp_path/'disk').iterdir()]==['real']
    same(tmp_path/'out', reference(base, experts, 'task_arithmetic'))

@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_what_a_run_left_that_was_cut_off_between_two_moves(models, tmp_path, kind):
    base, experts = models
    old = tmp_path/'.out.old'
    if kind=='file': old.write_text('x')
    else: (old/'deep').mkdir(parents=True); (old/'deep'/'f').write_text('x')
    (tmp_path/'out').mkdir(); (tmp_path/'out'/'before.txt').write_text('x')
    merge_files(base, experts, tmp_path/'out', device='cpu', overwrite=True)
    assert not old.exists() and not (tmp_path/'out'/'before.txt').exists()

def test_eight_bits_are_refused(models, tmp_path):
    base, experts = models
    tiny = folder(tmp_path/'tiny', {k: v.to(torch.float8_e4m3fn) if 'fc1' in k else v for k, v in loaded(experts[0]).items()})
    before = sorted(tmp_path.rglob('*'))
    for b, e in ((base, [experts[1], tiny]), (tiny, experts[1:])):
        with pytest.raises(ValueError, match='tiny has weights of eight bits.*bfloat16.*fc1.weight .torch.float8'): merge_files(b, e, tmp_path/'out', device='cpu')
    with pytest.raises(ValueError, match='16 bits'): merge_files(base, experts, tmp_path/'out', device='cpu', dtype='float8_e4m3fn')
    assert sorted(tmp_path.rglob('*'))==before

@pytest.mark.parametrize('where', ['base', 'expert'])
def test_tables_of_positions_may_be_missing(models, tmp_path, where):
    base, experts = models
    states = [loaded(base), *map(loaded, experts)]
    for i in ([0] if where=='base' else [1, 2]): states[i]['embeddings.position_ids'] = torch.arange(7)[None]
    paths = [folder(tmp_path/str(i), s) for i, s in enumerate(states)]
    want = reference(base, experts, 'task_arithmetic')
    if where=='base': want['embeddings.position_ids'] = torch.arange(7)[None]
    same(merge_files(paths[0], paths[1:], tmp_path/'out', device='cpu'), want)
    assert torch.equal(task_vector(states[0], states[1]).flat(), task_vector(loaded(base), loaded(experts[0])).flat())
    assert not where=='expert' or 'embeddings.position_ids' not in task_vector(states[0], states[1])

def test_a_layout_of_your_own(tmp_path):
    states = [{f'stage_{l}_att.w{c}.weight': torch.randn(8, 8, generator=torch.Generator().manual_seed(9*i+l+ord(c))) for l in range(2) for c in 'qkv'} for i in range(3)]
    base, *experts = [folder(tmp_path/str(i), s) for i, s in enumerate(states)]
    for options in (dict(beta=0.), dict(slope=.3)):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: .*no weight matrices in blocks"): merge_files(base, experts, tmp_path/'out', device='cpu', **options)
    assert sorted(f.name for f in tmp_path.iterdir())==['0', '1', '2']
    mine = Layout('mine', (r'stage_\d+_att',), ('wq', 'wk', 'wv'), r'att\.', rename=((r'stage_(\d+)_', r'blocks.\1.'),))
    out = loaded(merge_files(base, experts, tmp_path/'out', device='cpu', beta=0., layout=mine))
    for k, w in out.items():
        s = torch.linalg.svdvals(w-states[0][k])
        assert gap(s, s[:1].expand(8))<1e-4

def test_a_device_that_is_not_there(models, tmp_path):
    base, experts = models
    for device in ('meta', *(() if torch.cuda.is_available() else ('cuda',))):
        before = sorted(tmp_path.rglob('*'))
        with pytest.raises(ValueError, match=f'device {device} cannot'): merge_files(base, experts, tmp_path/'out', device=device)
        assert sorted(tmp_path.rglob('*'))==before

def test_weights_that_the_type_cannot_hold(models, tmp_path):
    base, experts = models
    with pytest.raises(ValueError, match='NaN or Inf in float16'): merge_files(base, experts, tmp_path/'out', alpha=1e6, dtype='float16', device='cpu')
    assert not (tmp_path/'out').exists() and not partial_folder(tmp_path/'out').exists()

@pytest.mark.parametrize('error', [RuntimeError, NotImplementedError])
def test_errors_of_torch_leave_nothing(models, tmp_path, error):
    base, experts = models
    def fail(): raise error('no kernel')
    with Meanwhile(fail) as executor, pytest.raises(error, match='no kernel'): merge_files(base, experts, tmp_path/'out', device='cpu', executor=executor)
    assert not (tmp_path/'out').exists() and not partial_folder(tmp_path/'out').exists()

def test_folders_below_the_base(models, tmp_path):
    base, experts = models
    for d in ('1_Pooling', '2_Dense', '.git', 'onnx'): (base/d).mkdir(); (base/d/'config.json').write_text(d)
    save_file({'w': torch.ones(2)}, base/'2_Dense'/'model.safetensors'); (base/'onnx'/'model.onnx').write_text('')
    out = merge_files(base, experts, tmp_path/'out', device='cpu')
    assert (out/'1_Pooling'/'config.json').read_text()=='1_Pooling' and not any((out/d).exists() for d in ('2_Dense', '.git', 'onnx'))

@pytest.mark.parametrize('method, options', [
    ('by_mergekit', dict(trim='magnitude', density=[.3, [['mlp', .7], [None, 1.]], .5], consensus=True, normalize=True)), ('by_mergekit', dict(trim='magnitude', density=[0., 1., .01])),
    ('by_mergekit', dict(trim='outliers', density=[.4, .8, .2], gamma=[.1, .05, .3], kind='float64')), ('by_mergekit', dict(trim='magnitude', density=[.5]*3, rescale=True)),
    ('model_stock', {}), ('model_stock', dict(slope=.2)), ('task_arithmetic', dict(slope=.4)), ('consensus', dict(slope=.4, beta=0.))])
def test_strips_have_the_bits_of_the_whole(models, tmp_path, monkeypatch, method, options):
    base, experts = models
    monkeypatch.setattr('subspace_nb.stream.sorted_whole', 0)
    whole = merge_files(base, experts, tmp_path/'whole', method, device='cpu', **options)
    for strip in (1, 37, 500): same(merge_files(base, experts, tmp_path/f'out{strip}', method, device='cpu', strip=strip, **options), loaded(whole))

def test_no_work_is_done_again_for_each_strip(models, tmp_path, monkeypatch):
    base, experts = models
    state = loaded(base)
    paths, formed, delta = [adapter(tmp_path/f'a{i}', i, state) for i in range(2)], [], Adapter.delta
    monkeypatch.setattr(Adapter, 'delta', lambda self, name, base=None: (formed.append(name), delta(self, name, base))[1])
    merge_files(base, [*paths, experts[0]], tmp_path/'out', 'consensus', device='cpu', strip=5)
    assert max(map(formed.count, Adapter(paths[0])))==2                                                          # one product of each adapter
    w, read, sizes = [torch.randn(40, 4) for _ in range(3)], Checkpoint.read, []
    def t5(w, twice=True): return {'shared.weight': w, 'encoder.block.0.layer.0.SelfAttention.q.weight': torch.randn(4, 4)} | ({'lm_head.weight': w.clone()} if twice else {})
    once, *twice = folder(tmp_path/'b', t5(w[0], False)), folder(tmp_path/'t1', t5(w[1])), folder(tmp_path/'t2', t5(w[2]))
    monkeypatch.setattr(Checkpoint, 'read', lambda self, name, part=slice(None): (sizes.append((x := read(self, name, part)).numel()), x)[1])
    merge_files(once, twice, tmp_path/'tied', device='cpu', strip=10)
    assert max(sizes)<=16                                                                                         # strips, never the whole of a tied tensor

def test_inputs_damaged_while_merging(models, tmp_path):
    base, experts = models
    class Saboteur(ThreadPoolExecutor):
        n = 0
        def submit(self, fn, *args):
            self.n += 1
            if self.n==5: os.truncate(experts[0]/'model.safetensors', 3000)
            return super().submit(fn, *args)
    with Saboteur(1) as executor, pytest.raises(ValueError, match='e0.model.safetensors (has changed its length|is damaged)'): merge_files(base, experts, tmp_path/'out', device='cpu', executor=executor)
    assert not (tmp_path/'out').exists() and not partial_folder(tmp_path/'out').exists()

class Tired(ThreadPoolExecutor):
    left = 9
    def submit(self, fn, *args):
        self.left -= 1
        if self.left<0: raise InterruptedError('off')
        return super().submit(fn, *args)

@pytest.mark.parametrize('method, options', [('task_arithmetic', {}), ('dare', {}), ('ties', dict(slope=.3)), ('knots', {}), ('breadcrumbs', {}), ('tsv_m', dict(slope=.2))])
def test_interrupted_merges_resume(models, tmp_path, method, options):
    base, experts = models
    runs = 0
    while not (tmp_path/'out').exists():
        runs += 1
        with Tired(1) as executor:
            executor.left = 20 if method not in ('ties', 'knots') else 200
            try: merge_files(base, experts, tmp_path/'out', method, device='cpu', executor=executor, **options)
            except InterruptedError: assert partial_folder(tmp_path/'out').exists()
        with open(partial_folder(tmp_path/'out')/'journal', 'ab') if partial_folder(tmp_path/'out').exists() else open(os.devnull, 'wb') as f: f.write(b'{"step": "mer')  # cut off while writing
    assert runs>1 or method in ('ties', 'knots')
    same(tmp_path/'out', reference(base, experts, method, **options))

def test_other_settings_start_anew(models, tmp_path):
    base, experts = models
    for alpha in (.1, .2):
        with Tired(1) as executor, pytest.raises(InterruptedError): merge_files(base, experts, tmp_path/'out', alpha=alpha, device='cpu', executor=executor)
    merge_files(base, experts, tmp_path/'out', alpha=.3, device='cpu')
    same(tmp_path/'out', reference(base, experts, 'task_arithmetic', .3))

def test_two_merges_into_one_folder(models, tmp_path):
    base, experts = models
    class Nested(ThreadPoolExecutor):
        error = None
        def submit(self, fn, *args):
            if self.error is None:
                try: merge_files(base, experts, tmp_path/'out', device='cpu'); self.error = 'none'
                except RuntimeError as e: self.error = str(e)
            return super().submit(fn, *args)
    with Nested(1) as executor: merge_files(base, experts, tmp_path/'out', device='cpu', executor=executor)
    assert 'another merge' in executor.error
    same(tmp_path/'out', reference(base, experts, 'task_arithmetic'))

SCRIPT = '''
import resource, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from subspace_nb.stream import merge_files
root = Path(sys.argv[1])
'''

def run(tmp_path, body, **kwargs):
    return subprocess.run([sys.executable, '-c', SCRIPT+textwrap.dedent(body), str(tmp_path)], capture_output=True, text=True, cwd=os.getcwd(), **kwargs)

def test_a_full_disk_leaves_nothing(models, tmp_path):
    base, experts = models
    r = run(tmp_path, '''
        size = max(f.stat().st_size for f in (root/'base').iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size-500, resource.RLIM_INFINITY))
        merge_files(root/'base', [root/'e0', root/'e1'], root/'out', device='cpu')''')
    assert r.returncode and 'no room for' in r.stderr and not (tmp_path/'out').exists() and not partial_folder(tmp_path/'out').exists()

def test_a_full_tmpfs_leaves_nothing(models, tmp_path):
    (tmp_path/'small').mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', str(tmp_path/'small')], capture_output=True).returncode: pytest.skip('mounting is not permitted here')
    try:
        with pytest.raises(OSError, match='no room for'): merge_files(models[0], models[1], tmp_path/'small'/'out', device='cpu')
        assert not list((tmp_path/'small').iterdir())
    finally: subprocess.run(['umount', str(tmp_path/'small')])

def test_a_killed_process_resumes(models, tmp_path):
    base, experts = models
    r = run(tmp_path, '''
        import os, signal
        from concurrent.futures import ThreadPoolExecutor
        class Killer(ThreadPoolExecutor):
            n = 0
            def submit(self, fn, *args):
                f = super().submit(fn, *args); f.result(); self.n += 1
                return f
        import subspace_nb.stream as s
        add = s.Journal.add
        def last_words(self, step, name, result):
            add(self, step, name, result)
            if len(self.done)==12: os.kill(os.getpid(), signal.SIGKILL)
        s.Journal.add = last_words
        merge_files(root/'base', [root/'e0', root/'e1', root/'e2'], root/'out', 'tsv_m', device='cpu', executor=Killer(1))''')
    assert r.returncode==-signal.SIGKILL and not (tmp_path/'out').exists()
    assert len(Journal(partial_folder(tmp_path/'out')).done)==12
    same(merge_files(base, experts, tmp_path/'out', 'tsv_m', device='cpu'), reference(base, experts, 'tsv_m'))

def test_memory_is_bounded(tmp_path):
    "A base and three experts of 136 MiB each, merged by every method in a process that may take the largest matrix three times and 512 MiB: too little for merging in memory."
    shapes = {'embed': (512, 8192), **{f'tail.{i}': (512, 8192) for i in range(6)}, **{f'layers.{i}.mlp.fc1.weight': (512, 1024) for i in range(12)}}    # 16 MiB and 2 MiB
    for i in range(4): save_file({k: torch.rand(s, generator=torch.Generator().manual_seed(i)) for k, s in shapes.items()}, tmp_path/f'{i}.safetensors')
    for i in range(1, 4): save_file({'layers.0.mlp.fc1.weight': torch.rand(20, 1024, generator=torch.Generator().manual_seed(i))}, tmp_path/f'in{i}.safetensors')
    slow = 'iso_c', 'higher_order_boosting', 'tsv_m', 'iso_cts', 'esm', 'knots'                     # one wide matrix and one block are enough of these
    plan = [(m, dict(skip='layers.[1-9]|tail') if m in slow else {}) for m in methods]
    plan += [('ties', dict(slope=.2)), ('consensus', dict(slope=.2)), ('task_arithmetic', dict(beta=0.)), ('by_mergekit', dict(trim='magnitude', density=[.5]*3, consensus=True, skip='tail'))]
    r = run(tmp_path, '''
        from safetensors.torch import load_file
        from subspace_nb.tasks import task_vector
        data = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmData'))*1024
        import gc
        from subspace_nb.spectra import give_back
        def limit():
            gc.collect(); give_back()                                                  # what the methods before left in the heap
            resource.setrlimit(resource.RLIMIT_DATA, (start+(3*16+512)*2**20, resource.RLIM_INFINITY))
        start, paths = data(), [root/f'{i}.safetensors' for i in range(1, 4)]
        for method, options in PLAN:
            limit()
            if method in ('regmean', 'esm'): options['inputs'] = [root/f'in{i}.safetensors' for i in range(1, 4)]
            try: merge_files(root/'0.safetensors', paths, root/'out', method, device='cpu', overwrite=True, **options)
            except Exception as e: raise RuntimeError(f'{method}, {options}') from e
        limit()
        try: base = load_file(root/'0.safetensors'); taus = [task_vector(base, load_file(p)) for p in paths]; print('no limit')
        except (RuntimeError, MemoryError): print('limited')'''.replace('PLAN', repr(plan)))
    assert r.returncode==0, r.stderr[-2000:]
    assert r.stdout.strip()=='limited'

def test_a_large_embedding_costs_strips(tmp_path):
    "Two experts and a base with an embedding of 128 MiB, merged entry by entry in a process that may take 200 MiB: less than two copies of it."
    for i in range(3): save_file({'embed': torch.rand(4096, 8192, generator=torch.Generator().manual_seed(i)), 'layers.0.mlp.fc1.weight': torch.rand(16, 8, generator=torch.Generator().manual_seed(9+i))}, tmp_path/f'{i}.safetensors')
    plan = [(m, {}) for m in methods if methods[m].entries] + [(m, dict(slope=.2)) for m in ('task_arithmetic', 'model_stock')]
    plan += [('task_arithmetic', dict(beta=0.)), *(('by_mergekit', dict(trim=trim, density=[.5]*2, consensus=True)) for trim in ('magnitude', 'outliers'))]
    r = run(tmp_path, '''
        from subspace_nb.spectra import give_back
        data = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmData'))*1024
        paths = [root/f'{i}.safetensors' for i in range(3)]
        merge_files(paths[0], paths[1:], root/'out', device='cpu', skip='embed')       # the libraries are loaded
        start = data()
        for method, options in PLAN:
            give_back()
            resource.setrlimit(resource.RLIMIT_DATA, (start+200*2**20, resource.RLIM_INFINITY))
            try: merge_files(paths[0], paths[1:], root/'out', method, device='cpu', overwrite=True, **options)
            except Exception as e: raise RuntimeError(f'{method}, {options}') from e
        print('done')'''.replace('PLAN', repr([(m, o | (dict(skip='embed') if m=='knots' else {})) for m, o in plan])))
    assert r.returncode==0 and r.stdout.strip()=='done', r.stderr[-2000:]

def test_options_are_the_methods_own():
    assert method_options('ties')=={'keep': .2} and method_options('consensus')=={'lam': .4, 'agree': 2} and method_options('higher_order_boosting')=={'pi': 1e-2, 'scale': 'unit'}

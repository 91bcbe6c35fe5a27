"""Task vectors, the choice of matrices, the engine: round trips, invariances, refusals."""
import pytest
import torch
from conftest import SHAPES, gap, make_tau, make_taus
from hypothesis import given, strategies as st

from subspace_nb.spectra import polar, stable_rank
from subspace_nb.tasks import (TaskVector, attention_modes, block_index, check_same_keys, check_taus, in_block, map_matrices,
                               map_task_vector, row_slices, task_vector, two_dim)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = {'resblocks.0.attn.in_proj_weight': (3*128, 64), 'resblocks.1.attn.in_proj_weight': (3*128, 64),
        'resblocks.0.mlp.c_fc.weight': (96, 64), 'resblocks.1.mlp.c_fc.weight': (96, 64), 'resblocks.0.attn.out_proj.weight': (64, 64),
        'resblocks.0.ln_1.weight': (64,), 'visual.positional_embedding': (9, 64)}

def same(a, b): return list(a)==list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype==b[k].dtype for k in a)

# arithmetic

@given(st.integers(0, 99), st.floats(-4, 4))
def test_vector_space(seed, c):
    a, b = make_taus(2, seed=seed)
    assert same(a+b, b+a) and same(a-a, 0*a) and same(sum([a, b]), a+b) and same(-a, a*-1)
    assert gap(((a+b)*c).flat(), (c*a+c*b).flat()) < 1e-12 or c==0
    assert gap(((a+b)-b).flat(), a.flat()) < 1e-12
    assert (a*c).norm()==pytest.approx(abs(c)*a.norm(), abs=1e-12)

@given(st.integers(0, 99), st.sampled_from([1., 2., 3.5, float('inf')]))
def test_norm_is_that_of_the_flat_vector(seed, p):
    tau = make_tau(seed)
    assert tau.norm(p)==pytest.approx(tau.flat().norm(p).item(), rel=1e-12)

@pytest.mark.parametrize('dtype', DTYPES)
def test_flat_round_trip(dtype):
    tau = make_tau(1, dtype)
    assert same(tau.unflat(tau.flat()), tau)
    assert tau.flat().dtype==(torch.float64 if dtype==torch.float64 else torch.float32)

def test_it_is_a_mapping_that_leaves_its_source_alone():
    d = {'a': torch.ones(2)}
    tau = TaskVector(d)
    d['b'] = torch.ones(2)
    assert list(tau)==['a'] and len(tau)==1 and 'b' not in tau and dict(tau)['a'] is tau['a']
    with pytest.raises(TypeError): tau['a'] = torch.zeros(2)
    assert TaskVector({}).norm()==0 and len(TaskVector({})+TaskVector({}))==0

@pytest.mark.parametrize('dtype', DTYPES)
def test_base_plus_task_vector_is_the_expert(dtype):
    base, expert = ({k: v for k, v in make_tau(i, dtype).items()} for i in (1, 2))
    tau = task_vector(base, expert)
    tol = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    state = tau.apply(base)
    assert list(state)==list(base) and all(v.dtype==dtype for v in state.values())
    assert gap(TaskVector(state).flat(), TaskVector(expert).flat()) < tol
    assert all(torch.equal(v, base[k]) for k, v in tau.apply(base, 0.).items())
    assert all(torch.equal(base[k], v) for k, v in make_tau(1, dtype).items())      # nothing was written into the base

def test_no_gradient_graph_is_carried_along():
    base = {'w': torch.nn.Parameter(torch.zeros(3))}
    tau = task_vector(base, {'w': torch.nn.Parameter(torch.ones(3))})
    assert not tau['w'].requires_grad and not tau.apply(base)['w'].requires_grad
    assert not TaskVector(base)['w'].requires_grad and base['w'].requires_grad

def test_integer_entries_are_carried_over():
    base = {'w': torch.zeros(2), 'ids': torch.arange(3), 'mask': torch.tensor([True, False])}
    tau = task_vector(base, base | {'w': torch.ones(2)})
    assert list(tau)==['w']
    state = tau.apply(base)
    assert state['ids'] is base['ids'] and state['mask'] is base['mask']

# refusals

def break_state(state, how, key):
    state = dict(state)
    v = state[key]
    if how=='missing': del state[key]
    elif how=='extra': state['one.more'] = torch.zeros(1)
    elif how=='shape': state[key] = torch.zeros(*v.shape, 2, dtype=v.dtype)
    elif how=='integer': state[key] = torch.zeros(v.shape, dtype=torch.int64)
    elif how in ('nan', 'inf', '-inf'): state[key] = torch.full_like(v, float(how))
    elif how=='list': state[key] = v.tolist()
    elif how=='none': state[key] = None
    return state

broken = st.sampled_from(('missing', 'extra', 'shape', 'integer', 'nan', 'inf', '-inf', 'list', 'none'))

@given(broken, st.sampled_from(sorted(SHAPES)), st.booleans(), st.sampled_from(DTYPES))
def test_base_and_expert_that_do_not_fit(how, key, in_base, dtype):
    base, expert = dict(make_tau(1, dtype)), dict(make_tau(2, dtype))
    if in_base: base = break_state(base, how, key)
    else: expert = break_state(expert, how, key)
    with pytest.raises((ValueError, TypeError)) as e: task_vector(base, expert)
    assert ('one.more' if how=='extra' else key) in str(e.value)
    assert 'base' in str(e.value) or 'expert' in str(e.value)

@given(st.lists(st.sampled_from(sorted(SHAPES)), min_size=2, max_size=5, unique=True))
def test_all_differences_are_listed(keys):
    base, expert = dict(make_tau(1)), dict(make_tau(2))
    for k, how in zip(keys, ('missing', 'shape', 'nan', 'integer', 'missing')): expert = break_state(expert, how, k)
    with pytest.raises(ValueError) as e: task_vector(base, expert)
    assert all(k in str(e.value) for k in keys)

@pytest.mark.parametrize('dtype', (torch.int64, torch.uint8, torch.bool))
def test_integer_entries_that_differ_are_refused(dtype):
    base = {'w': torch.zeros(2), 'ids': torch.zeros(3, dtype=dtype)}
    with pytest.raises(ValueError, match='ids'): task_vector(base, base | {'ids': torch.ones(3, dtype=dtype)})

@pytest.mark.parametrize('value', (None, 3, 'state.pt', [torch.ones(2)]))
def test_states_that_are_no_mappings(value):
    with pytest.raises(TypeError, match='expert'): task_vector({'w': torch.ones(2)}, value)
    with pytest.raises(TypeError, match='base'): task_vector(value, {'w': torch.ones(2)})
    with pytest.raises(TypeError, match='mapping'): TaskVector(value)

@pytest.mark.parametrize('mapping', ({'w': [1.]}, {'w': None}, {'w': torch.ones(2, dtype=torch.int32)}, {'w': torch.ones(2, dtype=torch.bool)},
                                     {'w': torch.ones(2, dtype=torch.complex64)}, {1: torch.ones(2)}))
def test_entries_that_are_no_floating_tensors(mapping):
    with pytest.raises(TypeError, match='mapping'): TaskVector(mapping)

def test_apply_refuses():
    tau = make_tau(1)
    base = dict(make_tau(2))
    with pytest.raises(KeyError, match='logit_scale'): tau.apply({k: v for k, v in base.items() if k!='logit_scale'})
    for k in SHAPES:       # a shape that would broadcast is no excuse
        with pytest.raises(ValueError, match='base'): tau.apply(base | {k: torch.zeros(2, *SHAPES[k], dtype=torch.float64)})
        with pytest.raises(ValueError, match='base'): tau.apply(base | {k: torch.zeros(SHAPES[k], dtype=torch.int64)})
    for alpha in (float('nan'), float('inf'), None, '1', [1.], True):
        with pytest.raises((ValueError, TypeError), match='alpha'): tau.apply(base, alpha)

@given(st.integers(2, 5), st.data())
def test_experts_that_cannot_be_merged(n, data):
    taus = make_taus(n)
    i = data.draw(st.integers(0, n-1), label='which')
    how = data.draw(st.sampled_from(('missing', 'extra', 'shape', 'nan', 'inf', '-inf', 'same', 'dict', 'none')), label='how')
    key = data.draw(st.sampled_from(sorted(SHAPES)), label='key')
    if how=='same': taus[i] = taus[i-1].map(lambda k, v: v.clone())
    elif how=='dict': taus[i] = dict(taus[i])
    elif how=='none': taus[i] = None
    else: taus[i] = TaskVector(break_state(taus[i], how, key))
    with pytest.raises((ValueError, TypeError), match='taus') as e: check_taus(taus)
    if how in ('missing', 'shape', 'nan', 'inf', '-inf'): assert key in str(e.value)

def test_lists_that_are_no_experts():
    a, b = make_taus(2)
    for value in ([], (), a, {}, dict(a), None, 5, 'abc', torch.ones(2), [TaskVector({})], [TaskVector({}), TaskVector({})]):
        with pytest.raises((ValueError, TypeError), match='taus'): check_taus(value)
    with pytest.raises(ValueError, match='at least 2'): check_taus([a], 2)
    with pytest.raises(ValueError, match='same expert'): check_taus([a, b, a.to(torch.float32).to(torch.float64)*0+a])
    with pytest.raises(ValueError, match='taus'): check_same_keys([a, TaskVector({'other': torch.ones(1)})])
    assert check_taus(iter([a, b]))==[a, b] and check_taus((a,))==[a]

def test_nearly_the_same_expert_is_welcome():
    a = make_tau(1)
    b = a.map(lambda k, v: v.clone())
    b['visual.conv1.weight'][-1, -1, -1] += 1e-9
    assert len(check_taus([a, b]))==2
    assert len(check_taus([a*0, a]))==2

@pytest.mark.parametrize('mode', ('', 'whole', None, 1, 'FULL_ATTN', 'per-qkv'))
def test_unknown_attention_is_refused(mode):
    with pytest.raises(ValueError, match='attention'): row_slices('mlp.c_fc.weight', torch.zeros(4, 4), mode)
    with pytest.raises(ValueError, match='attention'): map_matrices(polar, TaskVector({'b': torch.ones(2)}), attention=mode)

@pytest.mark.parametrize('width', (0, -1, 63, 1.5, '64', None, True))
def test_bad_head_width_is_refused(width):
    with pytest.raises((ValueError, TypeError), match='head_width'): row_slices('attn.in_proj_weight', torch.zeros(3*128, 8), 'per_head', width)

def test_fused_weights_need_three_parts():
    with pytest.raises(ValueError, match='rows'): row_slices('attn.in_proj_weight', torch.zeros(10, 8), 'per_qkv')

@pytest.mark.parametrize('taus', ([], None, [None], {}, [{'w': torch.ones(2, 2)}], 3))
def test_the_engine_refuses_what_is_no_task_vector(taus):
    for fn in (map_matrices, map_task_vector):
        with pytest.raises((ValueError, TypeError), match='taus'): fn(polar, taus)

# which entries are matrices

@pytest.mark.parametrize('name, depth', [
    ('visual.transformer.resblocks.11.mlp.c_proj.weight', 11), ('transformer.resblocks.0.attn.in_proj_weight', 0),
    ('text_model.encoder.layers.7.mlp.fc1.weight', 7), ('vit.encoder.layer.4.attention.attention.query.weight', 4),
    ('bert.encoder.layer.10.output.dense.weight', 10), ('encoder.block.3.layer.0.SelfAttention.q.weight', 3),
    ('decoder.block.2.layer.1.EncDecAttention.k.weight', 2), ('h.5.attn.c_attn.weight', 5), ('blocks.1.attn.qkv.weight', 1)])
def test_depth_from_names(name, depth):
    assert block_index(name)==depth and in_block(name, torch.zeros(2, 2)) and not in_block(name, torch.zeros(2))

@pytest.mark.parametrize('name', ('visual.proj', 'visual.conv1.weight', 'token_embedding.weight', 'text_projection', 'logit_scale',
                                  'embeddings.position_embedding.weight', 'layer_norm.weight', 'classifier.weight'))
def test_outside_the_blocks(name):
    assert block_index(name) is None and not in_block(name, torch.zeros(2, 2))
    assert two_dim(name, torch.zeros(2, 2))==('text_projection' not in name)

# the engine

@given(st.sampled_from(attention_modes), st.sampled_from((16, 32, 64, 128)), st.integers(1, 3))
def test_slices_tile_the_rows(mode, width, n):
    w = torch.zeros(3*128*n, 5)
    for name in ('a.in_proj_weight', 'a.qkv.weight', 'a.c_fc.weight'):
        parts = row_slices(name, w, mode, width)
        assert [r for _, s in parts for r in range(s.start, s.stop)]==list(range(len(w)))
        assert len({l for l, _ in parts})==len(parts)
        if 'c_fc' in name or mode=='full_attn': assert len(parts)==1
        else: assert len(parts)==(3 if mode=='per_qkv' else 3*128*n//width)

@pytest.mark.parametrize('mode', attention_modes)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('batch_bytes', (1., 2**17, 2**28))
def test_round_trip_through_the_engine(mode, dtype, batch_bytes):
    tau = make_tau(4, dtype, WIDE)
    back = map_task_vector(lambda x: x.clone(), tau, attention=mode, head_width=32, batch_bytes=batch_bytes, device='cpu')
    assert same(back, tau)
    mean = map_task_vector(lambda x: x.mean(0), [tau, make_tau(5, dtype, WIDE)], rest=lambda x: x.mean(0), attention=mode, batch_bytes=batch_bytes)
    assert all(v.dtype==dtype for v in mean.values())
    assert gap(mean.flat(), (tau.flat()+make_tau(5, dtype, WIDE).flat())/2) < {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]

@pytest.mark.parametrize('mode, heads', (('full_attn', 1), ('per_qkv', 3), ('per_head', 3*128//32)))
def test_the_engine_equals_a_loop(mode, heads):
    tau = make_tau(4, torch.float64, WIDE)
    got = map_task_vector(polar, tau, attention=mode, head_width=32)
    for k, w in tau.items():
        if not in_block(k, w): assert torch.equal(got[k], w)
        else:
            parts = w.chunk(heads if 'in_proj' in k else 1)
            assert gap(got[k], torch.cat([polar(p) for p in parts])) < 1e-9
    ranks = map_matrices(stable_rank, tau, attention=mode, head_width=32)
    assert len(ranks)==2*heads+3 and all(r.ndim==0 for r in ranks.values())

@pytest.mark.parametrize('dtype', DTYPES)
def test_the_stored_dtype_sets_the_numerical_rank(dtype):
    "A rank-8 update stored in half precision is no full-rank one, if the function sees how it was stored."
    rng = torch.Generator().manual_seed(5)
    w = (torch.randn(96, 8, generator=rng, dtype=torch.float64)@torch.randn(8, 64, generator=rng, dtype=torch.float64)).to(dtype)
    got = map_task_vector(polar, TaskVector({'h.0.w': w}), lifted=False)['h.0.w']
    assert got.dtype==dtype and (torch.linalg.svdvals(got.double()) > .1).sum()==8

def test_mixed_dtypes_keep_their_own():
    tau = TaskVector({'resblocks.0.a.weight': torch.randn(4, 3, dtype=torch.float64), 'resblocks.1.a.weight': torch.randn(4, 3, dtype=torch.bfloat16)})
    got = map_task_vector(polar, tau)
    assert [v.dtype for v in got.values()]==[torch.float64, torch.bfloat16]

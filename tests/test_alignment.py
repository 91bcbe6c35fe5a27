"""Alignment Matrix, its remedies, cheaper measures, rank correlation, selection: oracles, invariances, bad input."""
import itertools
import math
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from conftest import gap, make_taus
from subspace_nb.alignment import (alignment_by_matrix, alignment_matrix, best_subset, compare_pairs, expert_effects, expert_sigmas, group_alignment, interaction,
                                   mean_alignment, pair_alignment, pairs, rank_correlation, remedies, select_experts, subspace_overlap)
from subspace_nb.collapse import cosines
from subspace_nb.experts import Pool
from subspace_nb.hogsvd import hogsvd
from subspace_nb.tasks import TaskVector

BLOCK = 'visual.transformer.resblocks.{}.{}'
SHAPES = {BLOCK.format(0, 'attn.in_proj_weight'): (18, 6), BLOCK.format(0, 'mlp.c_fc.weight'): (12, 6), BLOCK.format(1, 'mlp.c_proj.weight'): (6, 12),
          BLOCK.format(1, 'ln_1.bias'): (6,), 'visual.proj': (6, 4)}

def taus_of(n, seed=0, dtype=torch.float64): return make_taus(n, dtype, seed, SHAPES)

def symmetric(n, seed):
    a = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a+a.mT).fill_diagonal_(0)

# --- Eq. 7

def test_equation_7_written_out():
    taus, key = taus_of(4), BLOCK.format(0, 'mlp.c_fc.weight')
    s = hogsvd([t[key] for t in taus]).sigmas
    want = torch.tensor([[sum(abs(math.log((s[i, p]+1e-12)/(s[j, p]+1e-12))) for p in range(6))/6 for j in range(4)] for i in range(4)], dtype=torch.float64)
    assert gap(alignment_matrix(taus, keys=[key]), want)<1e-12
    assert gap(alignment_matrix(taus, keys=key), want)<1e-12

@given(st.integers(2, 5), st.integers(0, 50), st.sampled_from(remedies))
def test_symmetric_nonnegative_zero_diagonal_and_equivariant(n, seed, remedy):
    taus = taus_of(n, seed)
    keys = [BLOCK.format(0, 'mlp.c_fc.weight'), BLOCK.format(0, 'attn.in_proj_weight')]        # full column rank: no pair without a shared direction
    a = alignment_matrix(taus, keys=keys, remedy=remedy)
    assert a.shape==(n, n) and a.dtype==torch.float64
    assert torch.allclose(a, a.mT) and (a>=0).all() and a.diag().abs().max()<1e-12
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(alignment_matrix([taus[i] for i in order], keys=keys, remedy=remedy), a[order][:, order], atol=1e-8)

def test_one_scale_for_all_changes_nothing_one_expert_alone_does():
    taus = taus_of(4)
    a = alignment_matrix(taus)
    assert gap(alignment_matrix([5*t for t in taus]), a)<1e-8
    louder = [taus[0]*10]+taus[1:]
    assert alignment_matrix(louder)[0, 1:].mean()>2*a[0, 1:].mean()
    assert gap(alignment_matrix(louder, unit=True), alignment_matrix(taus, unit=True))<1e-8

@given(st.integers(0, 50))
def test_left_rotations_change_nothing(seed):
    taus, key = taus_of(3, seed), BLOCK.format(0, 'mlp.c_fc.weight')
    def turned(i, t):
        q = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed+i)))[0]
        return t.map(lambda k, v: q@v if k==key else v)
    assert gap(alignment_matrix([turned(i, t) for i, t in enumerate(taus)], keys=[key]), alignment_matrix(taus, keys=[key]))<1e-8

def test_column_scale_of_the_shared_basis_cancels():
    s = torch.rand(3, 7, dtype=torch.float64)+.1
    scaled = s*torch.rand(7, dtype=torch.float64)*100
    for remedy in (None, 'angle', 'floor', 'drop'): assert gap(pair_alignment(scaled, remedy=remedy), pair_alignment(s, remedy=remedy))<1e-10

def test_two_experts_do_not_depend_on_pi():
    taus, key = taus_of(2), BLOCK.format(0, 'mlp.c_fc.weight')
    assert gap(alignment_matrix(taus, pi=1., keys=[key]), alignment_matrix(taus, pi=1e-3, keys=[key]))<1e-6

def test_mean_over_matrices_and_labels():
    taus = taus_of(3)
    parts = alignment_by_matrix(taus)
    assert len(parts)==5 and [k for k in parts if '[' in k]==[BLOCK.format(0, 'attn.in_proj_weight')+f'[{c}]' for c in 'qkv']
    assert gap(alignment_matrix(taus), sum(parts.values())/5)<1e-12
    assert len(alignment_by_matrix(taus, attention='full_attn'))==3
    assert len(alignment_by_matrix(taus, attention='per_head', head_width=3))==8

# --- remedies

def isolated(n=3, width=4): # expert i alone owns rows i of a stack: everything isolated
    key = BLOCK.format(0, 'mlp.c_proj.weight')
    return key, [TaskVector({key: torch.randn(width, width*n, dtype=torch.float64, generator=torch.Generator().manual_seed(i))}) for i in range(n)]

def test_isolated_directions_cost_27_6_each():
    key, taus = isolated(3)
    s = expert_sigmas(taus)[key]
    assert ((s==0) | ((s-1).abs()<1e-9)).all() and ((s>0).sum(-2)==1).all()
    big = math.log((1+1e-12)/1e-12)
    assert abs(alignment_matrix(taus)[0, 1].item()-2/3*big)<1e-6                  # a direction that neither has costs nothing
    assert abs(alignment_matrix(taus, eps=1e-3)[0, 1].item()-2/3*math.log(1001))<1e-6
    assert abs(alignment_matrix(taus, remedy='floor', floor=.1)[0, 1].item()-2/3*math.log(10))<1e-9
    assert abs(alignment_matrix(taus, remedy='angle')[0, 1].item()-2/3*math.pi/4)<1e-9
    assert alignment_matrix(taus, remedy='transpose')[0, 1]<5
    with pytest.raises(ValueError, match='share no direction'): alignment_matrix(taus, remedy='drop')
    assert alignment_by_matrix(taus, remedy='drop')[key][0, 1].isnan()

def test_drop_counts_only_shared_directions():
    s = torch.tensor([[1., 2., 1.], [1., 0., 2.]])
    assert abs(pair_alignment(s, remedy='drop')[0, 1].item()-math.log(2)/2)<1e-9

def test_without_faint_directions_floor_and_drop_are_the_paper():
    taus = taus_of(3)
    keys = [BLOCK.format(0, 'mlp.c_fc.weight')]
    for remedy in ('floor', 'drop', 'transpose'): assert gap(alignment_matrix(taus, keys=keys, remedy=remedy, floor=1e-6), alignment_matrix(taus, keys=keys))<1e-9

def test_drop_skips_the_matrix_where_a_pair_shares_nothing():
    nan = torch.tensor([[0., float('nan')], [float('nan'), 0.]])
    assert mean_alignment({'a': nan, 'b': torch.tensor([[0., 2.], [2., 0.]])}).tolist()==[[0., 2.], [2., 0.]]

# --- types, devices, checks

@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_lower_precision(dtype, tol):
    keys = [BLOCK.format(0, 'mlp.c_fc.weight'), BLOCK.format(0, 'attn.in_proj_weight')]
    want = alignment_matrix(taus_of(3), keys=keys)
    got = alignment_matrix([t.to(dtype) for t in taus_of(3)], keys=keys)
    assert got.dtype==torch.float64 and gap(got, want)<tol
    assert gap(alignment_matrix([t.to(dtype) for t in taus_of(3)], keys=keys, unit=True), alignment_matrix(taus_of(3), keys=keys, unit=True))<tol

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_agrees():
    taus = taus_of(4)
    gpu = [t.to('cuda') for t in taus]
    assert alignment_matrix(gpu).is_cuda and gap(alignment_matrix(gpu).cpu(), alignment_matrix(taus, device='cpu'))<1e-8
    assert gap(subspace_overlap(gpu, 2).cpu(), subspace_overlap(taus, 2, device='cpu'))<1e-8
    assert select_experts(alignment_matrix(gpu), 2)==select_experts(alignment_matrix(taus), 2)

@pytest.mark.parametrize('change,word', [
    (dict(pi=-1.), 'pi'), (dict(pi=float('nan')), 'pi'), (dict(eps=0.), 'eps'), (dict(eps=-1e-12), 'eps'), (dict(floor=0.), 'floor'), (dict(floor=1.), 'floor'),
    (dict(remedy='none'), 'remedy'), (dict(keys=['nope']), 'keys'), (dict(keys=[]), 'keys'), (dict(keys=[BLOCK.format(1, 'ln_1.bias')]), 'keys'),
    (dict(select=lambda k, v: False), 'select'), (dict(attention='half'), 'attention')])
def test_bad_options(change, word):
    with pytest.raises(ValueError, match=word): alignment_matrix(taus_of(3), **change)

def test_bad_task_vectors():
    taus, key = taus_of(3), BLOCK.format(0, 'mlp.c_fc.weight')
    with pytest.raises(ValueError, match='at least 2'): alignment_matrix(taus[:1])
    with pytest.raises(ValueError, match='empty'): alignment_matrix([])
    with pytest.raises(TypeError, match='list'): alignment_matrix(taus[0])
    with pytest.raises(ValueError, match=rf'taus\[1\]: {key}'): alignment_matrix([taus[0], taus[1].map(lambda k, v: v*0 if k==key else v), taus[2]])
    with pytest.raises(ValueError, match='NaN'): alignment_matrix([taus[0], taus[1].map(lambda k, v: v/0 if k==key else v)])
    with pytest.raises(ValueError, match='fit together'): alignment_matrix([taus[0], taus[1].map(lambda k, v: v[:, :3] if k==key else v)])
    with pytest.raises(ValueError, match='same expert'): alignment_matrix([taus[0], taus[0]])
    with pytest.raises(TypeError, match='remedy|eps'): alignment_matrix(taus, eps='1')

# --- overlap of leading subspaces

def test_overlap_by_definition_and_extremes():
    taus, key = taus_of(3), BLOCK.format(1, 'mlp.c_proj.weight')
    for side in ('in', 'out'):
        got = subspace_overlap(taus, 2, side, keys=[key])
        for i, j in itertools.product(range(3), repeat=2):
            (ui, _, vi), (uj, _, vj) = (torch.linalg.svd(taus[k][key], full_matrices=False) for k in (i, j))
            m = vi[:2]@vj[:2].mT if side=='in' else ui[:, :2].mT@uj[:, :2]
            assert abs(got[i, j]-m.square().sum()/2)<1e-9
    assert torch.allclose(subspace_overlap(taus, 6, 'out', keys=[key]), torch.ones(3, 3, dtype=torch.float64))      # all directions: the same space
    blocks = [TaskVector({key: torch.diag(torch.tensor([3., 2, 0, 0]).roll(2*i))+1e-3*torch.eye(4)}) for i in range(2)]
    assert torch.allclose(subspace_overlap(blocks, 2), torch.eye(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(subspace_overlap([taus[0], -2*taus[0], taus[1]], 2)[0, 1], torch.tensor(1., dtype=torch.float64))

@pytest.mark.parametrize('k', [0, 7, -1])
def test_overlap_refuses_k(k):
    with pytest.raises(ValueError, match='k must'): subspace_overlap(taus_of(2), k)

def test_overlap_refuses_side():
    with pytest.raises(ValueError, match='side'): subspace_overlap(taus_of(2), 2, 'left')
    with pytest.raises(TypeError, match='k must'): subspace_overlap(taus_of(2), 2.)

# --- rank correlation

def spearman(x, y): # by counting, in plain Python
    rank = lambda v: [sum(w<u for w in v)+(sum(w==u for w in v)+1)/2 for u in v]
    a, b = np.array(rank(x)), np.array(rank(y))
    return np.corrcoef(a, b)[0, 1]

@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=12))
def test_rank_correlation_counts(points):
    x, y = zip(*points)
    if len(set(x))<2 or len(set(y))<2: return
    assert abs(rank_correlation(x, y)[0]-spearman(x, y))<1e-9

def test_rank_correlation_leaves_nan_out():
    x, y = np.array([1., 2, np.nan, 4, 3]), np.array([1., 3, 9, 4, np.nan])
    assert abs(rank_correlation(x, y)[0]-1)<1e-12

def test_compare_pairs_finds_a_relation_and_no_relation():
    a, b = symmetric(12, 0), symmetric(12, 1)
    same = compare_pairs(a, a**3)
    assert abs(same['rho']-1)<1e-12 and same['p']<.01 and same['low']>.99
    ps = [compare_pairs(symmetric(10, 2*s), symmetric(10, 2*s+1), draws=100)['p'] for s in range(40)]
    assert sum(p<.1 for p in ps)<=10                                     # of 40, 4 are expected
    flip = compare_pairs(a, -a)
    assert abs(flip['rho']+1)<1e-12 and flip['p']<.01
    assert compare_pairs(a, b, seed=3)==compare_pairs(a, b, seed=3)

def test_compare_pairs_knows_that_pairs_share_experts():
    "A measure and a truth that are sums of unrelated expert effects: pairs as draws would reject far too often."
    effects = lambda s: (lambda e: e[:, None]+e)(torch.randn(12, generator=torch.Generator().manual_seed(s)))
    ps = [compare_pairs(effects(2*s), effects(2*s+1), draws=100)['p'] for s in range(40)]
    assert sum(p<.1 for p in ps)<=10

def test_compare_pairs_refuses():
    with pytest.raises(ValueError, match='shape'): compare_pairs(symmetric(4, 0), symmetric(5, 0))
    with pytest.raises(ValueError, match='4 experts'): compare_pairs(symmetric(3, 0), symmetric(3, 0))

def test_pairs_order():
    assert pairs([[0, 1, 2], [1, 0, 3], [2, 3, 0]]).tolist()==[1, 2, 3]

# --- selection

@given(st.integers(4, 8), st.integers(1, 3), st.integers(0, 2), st.integers(0, 1000))
def test_selection_against_brute_force(n, k, size, seed):
    a, pool = symmetric(n, seed), list(range(size))
    if k<2 and not pool: return
    if k>n-size: return
    best = max(itertools.combinations(range(size, n), k), key=lambda c: group_alignment(a, pool+list(c)))
    assert select_experts(a, k, pool, method='exhaustive')==list(best)
    picked = select_experts(a, k, pool)
    assert len(set(picked))==k and not set(picked)&set(pool)
    assert group_alignment(a, pool+picked)<=group_alignment(a, pool+list(best))+1e-12
    assert picked==greedy(a, k, pool, range(size, n))

def greedy(a, k, pool, candidates):
    "One step at a time, written out."
    picked = []
    if not pool: picked = list(max(itertools.combinations(candidates, 2), key=lambda p: a[p[0], p[1]].item()))
    while len(picked)<k:
        picked.append(max((c for c in candidates if c not in picked), key=lambda c: sum(a[c, m].item() for m in [*pool, *picked])/len([*pool, *picked])))
    return picked

def test_pool_method_ranks_by_the_pool_alone():
    a = symmetric(7, 3)
    want = sorted(range(2, 7), key=lambda c: -(a[c, 0]+a[c, 1]).item())[:3]
    assert select_experts(a, 3, [0, 1], method='pool')==want

def test_many_subsets_go_through_in_pieces():
    a = symmetric(20, 5)
    got = select_experts(a, 6, method='exhaustive')                      # 38,760 subsets
    assert got==best_subset(a, 6, [], list(range(20)), 10**6)
    big = symmetric(22, 6)
    found = select_experts(big, 5, [0], method='exhaustive', limit=10**5)  # 20,349
    assert group_alignment(big, [0]+found)>=group_alignment(big, [0]+select_experts(big, 5, [0]))

def test_candidates_are_respected_and_ties_go_to_the_smaller_index():
    a = torch.ones(6, 6)
    assert select_experts(a, 2, candidates=[5, 3, 1])==[1, 3]
    assert select_experts(a, 2, [0], [5, 3, 1])==[1, 3]
    assert select_experts(a, 2, [0], [5, 3, 1], 'exhaustive')==[1, 3]
    assert select_experts(a.numpy(), 2, [0], [5, 3, 1], 'pool')==[1, 3]

@pytest.mark.parametrize('args,error,word', [
    (dict(k=0), ValueError, 'k must'), (dict(k=6), ValueError, 'k must'), (dict(k=4, candidates=[1, 2, 3]), ValueError, 'candidates'), (dict(k=1), ValueError, 'k=1'),
    (dict(k=2., ), TypeError, 'k must'), (dict(k=True), TypeError, 'k must'), (dict(k=2, pool=[0], candidates=[0, 1, 2]), ValueError, 'overlap'),
    (dict(k=2, pool=[5]), ValueError, 'pool'), (dict(k=2, pool=[-1]), ValueError, 'pool'), (dict(k=2, candidates=[1, 2, 9]), ValueError, 'candidates'),
    (dict(k=2, candidates=[1, 1, 2]), ValueError, 'twice'), (dict(k=2, pool=['a']), TypeError, 'pool'), (dict(k=2, method='best'), ValueError, 'method'),
    (dict(k=2, method='pool'), ValueError, 'pool'), (dict(k=2, method='exhaustive', limit=3), ValueError, 'limit')])
def test_selection_refuses(args, error, word):
    with pytest.raises(error, match=word): select_experts(symmetric(5, 0), **args)

@pytest.mark.parametrize('bad,word', [(torch.ones(3, 4), 'square'), (torch.ones(4), 'square'), (torch.full((4, 4), float('nan')), 'NaN'),
                                      (torch.full((4, 4), float('inf')), 'Inf'), (torch.arange(16.).view(4, 4), 'symmetric')])
def test_selection_refuses_matrices(bad, word):
    with pytest.raises(ValueError, match=word): select_experts(bad, 2)

# --- the pool

def test_a_few_matrices_of_the_pool():
    pool = Pool.embedded()
    taus = pool.task_vectors(6)
    keys = [BLOCK.format(3, 'attn.out_proj.weight')]
    a = alignment_matrix(taus, keys=keys, device='cpu')
    assert a.shape==(6, 6) and torch.allclose(a, a.mT) and (a+torch.eye(6)>0).all()
    c = cosines(taus)
    assert torch.allclose(c.diag(), torch.ones(6, dtype=torch.float64))
    assert len(select_experts(a, 3, pool=[0, 1]))==3

# --- expert effects

@given(st.integers(3, 9), st.integers(0, 100))
def test_effects_are_the_least_squares_fit(n, seed):
    m = symmetric(n, seed)
    i, j = np.triu_indices(n, 1)
    design = np.zeros((len(i), n)); design[range(len(i)), i] += 1; design[range(len(i)), j] += 1
    coef = np.linalg.lstsq(design, pairs(m), rcond=None)[0]               # mean/2 + effect, each
    mean, effects = expert_effects(m)
    assert abs(mean-pairs(m).mean())<1e-12 and abs(effects.sum())<1e-9
    assert np.allclose(design@coef, mean+effects.numpy()[i]+effects.numpy()[j])
    left = interaction(m)
    assert torch.allclose(left.sum(1), torch.zeros(n, dtype=torch.float64), atol=1e-9) and torch.allclose(left, left.mT)

def test_effects_refuse():
    with pytest.raises(ValueError, match='matrix'): expert_effects(torch.ones(2, 2))
    with pytest.raises(ValueError, match='matrix'): expert_effects(torch.ones(3, 4))

def test_overlap_counts_missing_directions_as_not_shared():
    key = BLOCK.format(0, 'mlp.c_fc.weight')
    rank1 = [TaskVector({key: torch.outer(torch.randn(12, generator=torch.Generator().manual_seed(i)), torch.eye(6)[0])}) for i in range(2)]
    for side in ('in', 'out'): assert torch.allclose(subspace_overlap(rank1, 2, side).diag(), torch.full((2,), .5, dtype=torch.float64), atol=1e-6)
    assert abs(subspace_overlap(rank1, 2)[0, 1]-.5)<1e-6

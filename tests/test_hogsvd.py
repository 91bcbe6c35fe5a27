"HO-GSVD: rebuild, bounds, planted directions, the definition, invariances, any rank and height; Higher-Order boosting."
import pytest, torch
from hypothesis import given, settings, strategies as st
from conftest import gap, make_taus
from subspace_nb.boost import boost
from subspace_nb.hogsvd import (HOGSVD, boosted_merge, chained_qr, check_mats, check_pi, generalized_singular_values, higher_order_boosting, hogsvd,
                                gram_road, inverse_gram, inverse_rest, inverse_root, left_vectors, lower_gram, mean_inverse_eig, qr_rows, row_space, scales, shared_basis, split_isolated, stack_qr, tau_bounds)
from subspace_nb.merge import task_arithmetic
from subspace_nb.spectra import Lazy, lift, polar, singular_values
from subspace_nb.tasks import TaskVector

some = settings(max_examples=25, deadline=None)


def randn(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
def rand_q(n, seed=0): return torch.linalg.qr(randn(n, n, seed=seed))[0]
def family(rows, n, seed=0, ranks=None): return [randn(m, n, seed=seed+i) if not ranks else randn(m, ranks[i], seed=seed+i)@randn(ranks[i], n, seed=seed+99+i) for i, m in enumerate(rows)]


def definition(mats, pi):
    "Eqs. 31 and 32 as written: the mean of all pairwise quotients."
    N, total = len(mats), sum(a.mT@a for a in mats)
    d = [a.mT@a+pi*total for a in mats]
    return sum(d[i]@torch.linalg.inv(d[j])+d[j]@torch.linalg.inv(d[i]) for i in range(N) for j in range(i+1, N))/(N*(N-1))


def planted(N, n, common, alone, seed=0):
    "N matrices 2n × n with `common` shared directions of equal strength, `alone` directions in one matrix each, and generic others; and V."
    rng = torch.Generator().manual_seed(seed)
    s = torch.rand(N, n, generator=rng, dtype=torch.float64)+.2
    s[:, :common] = 1.
    for k in range(common, common+alone): s[:, k] = 0.; s[k%N, k] = 1.
    v = randn(n, n, seed=seed+1)+2*torch.eye(n)
    us = [torch.linalg.qr(randn(2*n, n, seed=seed+2+i))[0] for i in range(N)]
    return [u*x@v.mT for u, x in zip(us, s)], v, s/s.norm(dim=0)


def cosine(a, b): return (a@b/a.norm()/b.norm()).abs().item()


@some
@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.integers(1, 8), st.sampled_from([1e-12, 1e-6, 1e-3, 1e-2, 1., 100.]), st.integers(0, 10**6))
def test_rebuild_and_bounds(rows, n, pi, seed):
    mats = family(rows, n, seed)
    d = hogsvd(mats, pi)
    lo, hi = d.bounds
    for i, a in enumerate(mats): assert gap(d.rebuild(i), a)<1e-10
    assert (d.tau>=lo*(1-1e-6)).all() and (d.tau<=hi*(1+1e-6)).all() and (d.tau.diff()>=-2e-6*(hi-lo)).all()
    assert (d.lam>=1-1e-5*(1+d.lam)).all()
    whole = d.blocks==len(mats)
    if whole:
        assert torch.allclose(d.sigmas.square().sum(-2), torch.ones(n, dtype=torch.float64))
        assert gap(d.v@d.v.mT, sum(a.mT@a for a in mats))<1e-10
    for u, s, a in zip(d.us, d.sigmas, mats):
        size = u.norm(dim=0)
        assert torch.allclose(size[s>0], torch.ones_like(size[s>0])) and ((size-1).abs()<1e-9).logical_or(size==0).all()
    assert torch.equal(generalized_singular_values(mats, pi), d.sigmas) and len(d)==len(mats)
    assert 'HOGSVD' in repr(d)


@some
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6))
def test_low_ranks(rows, n, rank, seed):
    mats = family(rows, n, seed, [min(rank, m, n) for m in rows])
    d = hogsvd(mats)
    for i, a in enumerate(mats): assert gap(d.rebuild(i), a)<1e-10
    ranks = sum(torch.linalg.matrix_rank(a).item() for a in mats)
    if ranks<=n:                                       # nothing in common: each direction belongs to one matrix
        assert d.isolated().all() and ((d.sigmas-1).abs().minimum(d.sigmas.abs())<1e-7).all()
        for i, a in enumerate(mats):                   # and V's part of a matrix is its own SVD
            mine = d.sigmas[i]>.5
            own = torch.linalg.svdvals(a)[:int(mine.sum())]
            assert torch.allclose(d.v[:, mine].norm(dim=0), own, rtol=1e-7)
            part = d.v[:, mine].mT@d.v[:, mine]
            assert (part-part.diag().diag()).norm()<1e-8*part.norm()


@pytest.mark.parametrize('pi', [1e-2, 1e-5, 1., 0.])
@pytest.mark.parametrize('N', [2, 3, 5])
def test_the_definition(N, pi):
    n = 6
    mats = [randn(9, n, seed=10*N+i) for i in range(N)]
    S, d = definition(mats, pi), hogsvd(mats, pi)
    assert (S@d.v-d.v*d.lam).norm()<1e-8*(d.v*d.lam).norm()
    w, x = torch.linalg.eig(S)
    assert w.imag.abs().max()<1e-6*w.real.max()
    w, order = w.real.sort()
    assert torch.allclose(w, d.lam, rtol=1e-7)
    for k in range(n): assert cosine(x.real[:, order[k]], d.v[:, k])>1-1e-8
    direct = torch.stack([(a@torch.linalg.inv(x.real[:, order]).mT).norm(dim=0) for a in mats])   # Ponnappalli: B_i = A_i V⁻ᵀ with unit columns
    assert torch.allclose(direct, d.unit().sigmas, rtol=1e-6)


@some
@given(st.integers(3, 6), st.integers(0, 10**6), st.sampled_from([1e-3, 1e-2, .1]))
def test_planted_directions(N, seed, pi):
    n, common, alone = 8, 2, 3
    mats, v, s = planted(N, n, common, alone, seed)
    d = hogsvd(mats, pi)
    assert d.common().sum()==common and d.isolated().sum()==alone
    assert torch.allclose(d.sigmas[:, d.common()], torch.full((N, common), N**-.5, dtype=torch.float64), atol=1e-6)
    found = d.sigmas[:, d.isolated()].T
    assert torch.allclose(found.sort(0).values, s[:, common:common+alone].T.sort(0).values, atol=1e-6)
    for k in range(common, common+alone):              # the isolated direction is the row direction that V holds there
        same = [j for j in range(common, common+alone) if j%N==k%N]
        cols = d.v[:, d.isolated() & (d.sigmas[k%N]>.5)]
        proj = torch.linalg.lstsq(cols, v[:, k:k+1]).solution
        assert cols.shape[1]==len(same) and (cols@proj-v[:, k:k+1]).norm()<1e-5*v[:, k].norm()
    lo, hi = d.bounds
    assert torch.allclose(d.lam[d.common()], torch.ones(common, dtype=torch.float64), atol=1e-4)


@some
@given(st.integers(2, 5), st.integers(1, 7), st.integers(0, 10**6))
def test_order_and_rotations(N, n, seed):
    mats = [randn(n+1+i, n, seed=seed+i) for i in range(N)]
    d = hogsvd(mats)
    perm = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()
    e = hogsvd([mats[i] for i in perm])
    assert torch.allclose(e.tau, d.tau, rtol=1e-9) and gap(e.sigmas, d.sigmas[perm])<1e-5
    turned = hogsvd([rand_q(len(a), seed+i)@a for i, a in enumerate(mats)])
    assert torch.allclose(turned.tau, d.tau, rtol=1e-9) and gap(turned.sigmas, d.sigmas)<1e-5
    assert gap(turned.v.abs(), d.v.abs())<1e-5
    w = randn(n, n, seed=seed+7)+3*torch.eye(n)        # a change of the right basis carries V along
    moved = hogsvd([a@w.mT for a in mats])
    assert torch.allclose(moved.tau, d.tau, rtol=1e-7) and gap(moved.sigmas, d.sigmas)<1e-4
    assert torch.allclose(hogsvd([1e3*a for a in mats]).tau, d.tau, rtol=1e-9)


@some
@given(st.integers(1, 8), st.integers(0, 10**6), st.floats(1e-6, 10.))
def test_two_matrices_are_the_plain_gsvd(n, seed, pi):
    a, b = randn(n+3, n, seed=seed), randn(n, n, seed=seed+1)
    d = hogsvd([a, b], pi)
    q, _ = torch.linalg.qr(torch.cat([a, b]))          # the cosine-sine decomposition of the stack
    c = torch.linalg.svdvals(q[:n+3])
    assert torch.allclose(d.sigmas[0].sort(descending=True).values, c, atol=1e-6)
    assert torch.allclose(d.sigmas[1].sort().values.square(), 1-c.square(), atol=1e-6)
    if n<2 or (c.diff().abs().min()>1e-3 and ((c**2-.5).abs()[:, None]-(c**2-.5).abs()).add(torch.eye(n)).abs().min()>1e-3):
        assert gap(hogsvd([a, b], 1e-2).sigmas, d.sigmas)<1e-5      # whatever π, unless τ repeats


def test_pi_matters_for_more_than_two():
    mats = family([7]*3, 5)
    v = [hogsvd(mats, pi).unit().v for pi in (1e-3, 1.)]
    assert max(1-cosine(v[0][:, k], v[1][:, k]) for k in range(5))>1e-3


@pytest.mark.parametrize('dtype, tol', [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)])
def test_half_and_single(dtype, tol):
    mats = [randn(10, 7, seed=i, dtype=dtype) for i in range(3)]
    d, e = hogsvd(mats), hogsvd([a.double() for a in mats])
    assert d.v.dtype==d.sigmas.dtype==d.tau.dtype==d.us[0].dtype==torch.float32
    for i, a in enumerate(mats): assert gap(d.rebuild(i), a)<tol
    assert torch.allclose(d.tau.double(), e.tau, rtol=1e-6) and gap(d.sigmas, e.sigmas)<1e-6
    low = [(randn(9, 2, seed=i)@randn(2, 7, seed=i+9)).to(dtype) for i in range(2)]      # rounding noise in the other directions
    d = hogsvd(low)
    for i, a in enumerate(low): assert gap(d.rebuild(i), a)<1e-5
    if dtype==torch.float32: assert d.blocks==3 and d.isolated().all() and set(d.sigmas.flatten().tolist())<={0., 1.}


def test_batches_equal_loops():
    full, low, wide = torch.stack(family([6]*4, 4)).reshape(2, 2, 6, 4), torch.stack(family([6]*4, 4, 5, [1, 2, 4, 4])).reshape(2, 2, 6, 4), randn(2, 2, 2, 4, seed=3)
    mats = [full, low, wide]
    d = hogsvd(mats)
    for b in ((0, 0), (0, 1), (1, 1)):
        e = hogsvd([a[b] for a in mats])
        assert torch.allclose(e.tau, d.tau[b]) and torch.allclose(e.sigmas, d.sigmas[b], atol=1e-8) and torch.allclose(e.v, d.v[b], atol=1e-8)
        for i in range(3): assert torch.allclose(e.us[i], d.us[i][b], atol=1e-7)
    for i, a in enumerate(mats): assert gap(d.rebuild(i), a)<1e-12
    lead = torch.stack([full, low])
    assert torch.equal(generalized_singular_values(lead), hogsvd([full, low]).sigmas)


@pytest.mark.parametrize('pi', [1e-2, 1e-4])
def test_the_batched_path_of_a_gpu(pi):
    low, full = family([3]*4, 8, 2, [1, 2, 2, 1]), family([3]*4, 8)      # one stack lacks directions, the other does not
    mats = [torch.stack([a, b]) for a, b in zip(low, full)]
    bs, sigmas, v, tau, blocks = shared_basis(mats, pi, 2e-16)
    assert blocks.tolist()==[5, 4] and sigmas.shape==(2, 4, 8)
    for b, one in enumerate((low, full)):
        d = hogsvd(one, pi)
        assert torch.allclose(d.tau, tau[b]) and torch.allclose(d.sigmas, sigmas[b], atol=1e-7)
        for i, a in enumerate(one): assert gap(bs[i][b]@v[b].mT, a)<1e-10
    narrow = family([2]*3, 9)
    qs, r, low, extra = stack_qr([torch.stack([a, 2*a]) for a in narrow], 2e-16)
    assert low.all() and gap(torch.cat([q[1] for q in qs])@r[1], 2*torch.cat(narrow))<1e-12
    assert gap(sum(q.mT@q for q in qs)+extra.mT@extra, torch.eye(9).expand(2, 9, 9))<1e-12


def test_zero_values_get_orthonormal_left_vectors():
    mats = [randn(7, 2, seed=1)@randn(2, 5, seed=2), randn(7, 5, seed=3)]
    d = hogsvd(mats)
    zero = d.sigmas[0]==0
    assert zero.sum()==3 and gap(d.us[0].mT@d.us[0], torch.eye(5))<1e-8     # two matrices: left vectors are orthonormal
    assert gap(d.rebuild(0), mats[0])<1e-12
    bare = hogsvd(mats, complete=False)
    assert (bare.us[0][:, zero]==0).all() and gap(bare.rebuild(0), mats[0])<1e-12
    wide = hogsvd(family([3, 3], 6))                                        # room for three columns only
    for u in wide.us: assert gap(u@u.mT, torch.eye(3))<1e-10 and (u.norm(dim=0)>0).sum()==3
    half = hogsvd([torch.cat([randn(4, 1, seed=5)@randn(1, 6, seed=6)]), randn(2, 6, seed=7)])
    assert (half.us[0].norm(dim=0)>.5).sum()==4                             # one of its own, three from the left null space


def test_isolated_tall_group():
    q = rand_q(6)
    mats = [q[:, :2].mT, q[:, 2:4].mT, q[:, 4:].mT]
    d = hogsvd(mats)
    assert d.isolated().all() and torch.allclose(d.sigmas.sum(0), torch.ones(6, dtype=torch.float64)) and (d.sigmas==0).sum()==12
    z = rand_q(6, 3)
    y = split_isolated([a@z for a in mats], z)
    assert gap(y.mT@y, torch.eye(6))<1e-12


@some
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1e-2, 1., 1e-3]), st.integers(0, 10**6))
def test_pieces(m, n, pi, seed):
    q = torch.linalg.qr(randn(m+n, n, seed=seed))[0][None, :m]
    ref = torch.linalg.inv(q.mT@q+pi*torch.eye(n, dtype=torch.float64))
    assert gap(inverse_gram(q, pi), ref)<1e-11
    x = inverse_root(q, pi)
    assert gap(x.mT@x, ref)<1e-11
    g = q.mT@q
    assert gap(inverse_rest(q, pi), g@ref@g)<1e-11
    lo, hi = tau_bounds(3, pi)
    assert lo<hi and tau_bounds(3, 0.)[1]==float('inf') and tau_bounds(3, 0.)[0]==3


def test_both_roads_to_tau():
    q = torch.linalg.qr(randn(30, 6))[0][None].split(10, -2)
    a, za = mean_inverse_eig(q, 1e-3)
    ref, _ = torch.linalg.eigh(sum(torch.linalg.inv(x.mT@x+1e-6*torch.eye(6)) for x in q)/3)
    b, zb = mean_inverse_eig(q, 1e-6)
    assert torch.allclose(b, ref, rtol=1e-9) and gap(zb.mT@zb, torch.eye(6)[None])<1e-12 and gap(za.mT@za, torch.eye(6)[None])<1e-12


def test_a_large_pi_keeps_its_digits():
    q = torch.linalg.qr(randn(30, 6))[0][None].split(10, -2)
    _, z = mean_inverse_eig(q, 1e7)
    _, limit = torch.linalg.eigh(sum((x.mT@x)@(x.mT@x) for x in q))
    assert ((z.mT@limit).abs()-torch.eye(6)).abs().max()<1e-5
    tau, _ = mean_inverse_eig(q, 1.)
    ref = torch.linalg.eigvalsh(sum(torch.linalg.inv(x.mT@x+torch.eye(6)) for x in q)/3)
    assert torch.allclose(tau, ref, rtol=1e-12)


@pytest.mark.parametrize('small', [1e-4, 1e-8, 1e-12, 1e-30])
@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_experts_of_very_different_size(small, dtype, tol):
    mats = [small*randn(9, 7, dtype=dtype), randn(9, 7, seed=1, dtype=dtype), small*randn(4, 7, seed=2, dtype=dtype), randn(3, 7, seed=3, dtype=dtype)]
    d = hogsvd(mats)
    for i, a in enumerate(mats): assert gap(d.rebuild(i), a)<tol


@pytest.mark.parametrize('size', [1e-200, 1e-150, 1e150, 1e200])
def test_any_common_factor(size):
    mats = family([9, 4], 7)
    d, e = hogsvd(mats), hogsvd([size*a for a in mats])
    assert torch.allclose(e.tau, d.tau) and gap(e.v/size, d.v)<1e-9 and gap(e.sigmas, d.sigmas)<1e-9


def test_the_same_matrix_again():
    d = hogsvd([randn(8, 5)]*3)
    assert d.common().all() and torch.allclose(d.lam, torch.ones(5, dtype=torch.float64))


def test_rows_come_back_in_their_order():
    a = randn(2, 9, 4)*torch.logspace(0, -20, 9, dtype=torch.float64)[:, None]
    q, r = qr_rows(a)
    assert (q@r-a).norm(dim=-1).div(a.norm(dim=-1)).max()<1e-12 and gap(q.mT@q, torch.eye(4).expand(2, 4, 4))<1e-12


@some
@given(st.integers(2, 5), st.integers(1, 40), st.sampled_from([1e-3, 1e-2, .5]), st.integers(0, 10**6))
def test_the_short_cut_agrees(N, n, pi, seed):
    mats = [torch.stack([randn(m, n, seed=seed+i), randn(m, n, seed=seed+50+i)]) for i, m in enumerate([n+2]*N+[max(1, n//2)])]
    fast = gram_road(mats, pi, 2e-16)
    g = lower_gram(mats[0])
    assert gap(g.tril(), (mats[0].mT@mats[0]).tril())<1e-12
    assert fast is not None
    qs, r, low, extra = stack_qr(mats, 2e-16)
    tau, z = mean_inverse_eig(qs, pi)
    assert extra is None and torch.allclose(fast[0], tau, rtol=1e-10) and gap(fast[2]@fast[2].mT, r.mT@r)<1e-10
    for a, q in zip(mats, qs): assert gap(a@fast[1]@fast[2].mT, a)<1e-10
    assert gram_road(mats, 1e-9, 2e-16) is None and gram_road(mats, 2., 2e-16) is None
    if n>1: assert gram_road([a*torch.logspace(0, -4, n, dtype=torch.float64) for a in mats], pi, 2e-16) is None


def test_lower_gram_by_blocks():
    a = randn(2, 60, 300)
    assert gap(lower_gram(a).tril(), (a.mT@a).tril())<1e-13


def test_left_vectors_of_nothing():
    b = torch.zeros(1, 3, 2, dtype=torch.float64); b[0, 0, 0] = 2.
    u = left_vectors(b, b.norm(dim=-2))
    assert gap(left_vectors(0*b, 0*b.norm(dim=-2)).mT@left_vectors(0*b, 0*b.norm(dim=-2)), torch.eye(2)[None])<1e-12
    assert gap(u.mT@u, torch.eye(2)[None])<1e-12


def test_unit_scale_keeps_the_product():
    mats = family([6, 7], 5)
    d = hogsvd(mats).unit()
    assert torch.allclose(d.v.norm(dim=0), torch.ones(5, dtype=torch.float64)) and gap(d.rebuild(1), mats[1])<1e-12


def test_refusals():
    a = randn(4, 3)
    for bad, what in (([a], 'two'), ([a, randn(4, 2)], 'columns'), ([a, torch.zeros(4, 3)], 'mats\\[1\\]'), ([a, a*float('nan')], 'NaN'),
                      ([a, a*float('inf')], 'Inf'), ([a, a[0]], 'shape'), ([a, torch.empty(0, 3)], 'empty'), ([a, a.expand(2, 4, 3)], 'leading'),
                      (a, 'list'), ([torch.stack([a, 0*a]), torch.stack([a, a])], 'mats\\[0\\]')):
        with pytest.raises(ValueError, match=what): hogsvd(bad)
    for bad in ((x for x in (a, a)), None, 'ab', {0: a}):
        with pytest.raises(TypeError, match='mats'): hogsvd(bad)
    for bad in ([a, a.long()], [a, [1.]]):
        with pytest.raises(TypeError, match='mats\\[1\\]'): check_mats(bad)
    for pi in (-1e-9, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='pi'): generalized_singular_values([a, a], pi)
    for pi in ('1', None, True):
        with pytest.raises(TypeError, match='pi'): check_pi(pi)
    with pytest.raises(ValueError, match='pi=0.*mats\\[1\\]'): hogsvd([a, a[:2]], 0)
    with pytest.raises(ValueError, match='rank_tol'): hogsvd([a, a], rank_tol=2)
    assert isinstance(hogsvd([a, 2*a], 0), HOGSVD)


# Higher-Order boosting

def algorithm_2(mats, beta, pi, unit):
    "The paper's pseudocode on one layer, from the nonsymmetric eigenproblem."
    w, v = torch.linalg.eig(definition(mats, pi))
    v = v.real[:, w.real.argsort()]
    if not unit:
        d = hogsvd(mats, pi); v = d.v
    bs = [a@torch.linalg.inv(v).mT for a in mats]
    sig, us = sum(b.norm(dim=0) for b in bs), sum(b/b.norm(dim=0) for b in bs)
    po = lambda x: (lambda u, _, vh: u@vh)(*torch.linalg.svd(x, full_matrices=False))
    down = sig.sort(descending=True).values
    cut = down[((down.cumsum(0)/down.sum())>=beta).nonzero()[0]] if beta<1 else down[-1]
    return po(us)@torch.diag(sig.clamp(min=cut.item()))@po(v).mT


@pytest.mark.parametrize('beta', [0., .3, 1.])
@pytest.mark.parametrize('scale', scales)
def test_equals_algorithm_2(beta, scale):
    mats = [randn(8, 5, seed=i) for i in range(3)]
    assert gap(boosted_merge(mats, beta, 1e-2, scale), algorithm_2(mats, beta, 1e-2, scale=='unit'))<1e-7
    if beta==0: s = singular_values(boosted_merge(mats, 0., scale=scale)); assert torch.allclose(s, s[:1].expand(5))


def from_decomposition(mats, beta, pi, unit):
    "Algorithm 2 from the whole decomposition, all matrices and directions at once."
    d = hogsvd(mats, pi, complete=False)
    if unit: d = d.unit()
    s, order = d.sigmas.sum(-2).sort(-1, descending=True)
    lifted = torch.empty_like(s).scatter_(-1, order, lift(s, beta))
    return (polar(sum(d.us))*lifted)@polar(d.v).mT


def shaped(kind):
    "Experts' matrices of one kind."
    tall, wide = [randn(30, 12, seed=i) for i in range(5)], [randn(5, 12, seed=i) for i in range(5)]
    return {'tall': tall, 'wide': wide, 'wide, low': wide[:2], 'adapters': [randn(30, 2, seed=i)@randn(2, 12, seed=9+i) for i in range(3)],
            'steep': [a*torch.logspace(0, -7, 12, dtype=torch.float64) for a in tall], 'one faint': [tall[0], 1e-9*tall[1], tall[2]],
            'float32': [a.float() for a in wide], 'float32 adapters': [(randn(30, 2, seed=i)@randn(2, 12, seed=9+i)).float() for i in range(3)]}[kind]


@pytest.mark.parametrize('scale', scales)
@pytest.mark.parametrize('beta', [0., .4])
@pytest.mark.parametrize('kind', ['tall', 'wide', 'wide, low', 'adapters', 'steep', 'one faint', 'float32', 'float32 adapters'])
def test_one_matrix_at_a_time(kind, beta, scale):
    mats = shaped(kind)
    out = boosted_merge(mats, beta, 1e-2, scale)
    assert gap(out, from_decomposition(mats, beta, 1e-2, scale=='unit'))<(2e-5 if '32' in kind else 1e-6)
    asked = []
    def read(i): asked.append(i); return mats[i]
    assert torch.equal(boosted_merge(Lazy(len(mats), read), beta, 1e-2, scale), out) and set(asked)==set(range(len(mats)))
    batch = boosted_merge([torch.stack([m, 2*m]) for m in mats], beta, 1e-2, scale)
    assert torch.equal(batch[0], out)


@pytest.mark.parametrize('pi', [0., 1e-8, 1e-2, 2.])
def test_chained_qr(pi):
    mats = [randn(1, 6, 4, seed=i) for i in range(3)]
    qs, r = chained_qr(mats)
    for q, a in zip(qs, mats): assert gap(q@r, a)<1e-12
    assert gap(sum(q.mT@q for q in qs), torch.eye(4, dtype=torch.float64)[None])<1e-12 and row_space(mats, 2e-16) is None
    a, b = mean_inverse_eig(qs, pi), mean_inverse_eig(stack_qr(mats, 2e-16)[0], pi)
    assert gap(a[0], b[0])<1e-9
    thin = [randn(1, 6, 1, seed=i)@randn(1, 4, seed=5) for i in range(3)]
    for eps in (2e-16, 1e-7): assert row_space(thin, eps).shape==(1, 4, 1) and gap(thin[0]@row_space(thin, eps)@row_space(thin, eps).mT, thin[0])<1e-10


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_higher_order_boosting(dtype):
    taus = make_taus(3, dtype)
    out = higher_order_boosting(taus, .1)
    assert list(out)==list(taus[0])
    name, vector = 'visual.transformer.resblocks.2.mlp.c_fc.weight', 'visual.transformer.resblocks.0.mlp.c_fc.bias'
    assert all(out[k].dtype==dtype and out[k].shape==taus[0][k].shape for k in out)
    assert gap(out[name], boosted_merge([t[name] for t in taus], .1))<1e-2 and gap(out[vector], task_arithmetic(taus)[vector])<1e-2
    fused = 'visual.transformer.resblocks.0.attn.in_proj_weight'
    if dtype==torch.float64:
        assert gap(out[fused][4:8], boosted_merge([t[fused][4:8] for t in taus], .1))<1e-9
        whole = higher_order_boosting(taus, .1, attention='full_attn', select=lambda k, w: k==fused)
        assert gap(whole[fused], boosted_merge([t[fused] for t in taus], .1))<1e-9 and gap(whole[name], task_arithmetic(taus)[name])<1e-12


@pytest.mark.parametrize('scale', scales)
def test_order_of_experts_does_not_matter(scale):
    taus = make_taus(4)
    a, b = higher_order_boosting(taus, scale=scale), higher_order_boosting(taus[::-1], scale=scale)
    assert all(gap(a[k], b[k])<1e-7 for k in a)


def test_layers_that_some_experts_left_alone():
    name = 'visual.transformer.resblocks.2.mlp.c_fc.weight'
    taus = make_taus(3)
    still = lambda t, *ks: t.map(lambda k, w: 0*w if k in ks else w)
    one = higher_order_boosting([taus[0], still(taus[1], name), still(taus[2], name)])
    assert gap(one[name], boost(taus[0][name]))<1e-9
    two = higher_order_boosting([taus[0], taus[1], still(taus[2], name)])
    assert gap(two[name], boosted_merge([t[name] for t in taus[:2]]))<1e-9
    none = higher_order_boosting([still(t, name) for t in taus])
    assert (none[name]==0).all()


def test_boosting_refusals():
    taus = make_taus(2)
    for kw in (dict(beta=2), dict(pi=-1), dict(scale='long'), dict(attention='half')):
        with pytest.raises(ValueError, match=next(iter(kw))): higher_order_boosting(taus, **kw)
    with pytest.raises(ValueError, match='at least 2'): higher_order_boosting(taus[:1])
    with pytest.raises(ValueError, match='same expert'): higher_order_boosting([taus[0], taus[0]])
    with pytest.raises(TypeError, match='TaskVector'): higher_order_boosting([dict(taus[0]), taus[1]])
    with pytest.raises(ValueError, match='NaN'): higher_order_boosting([taus[0], taus[1]*float('nan')])
    assert isinstance(higher_order_boosting(taus), TaskVector)
